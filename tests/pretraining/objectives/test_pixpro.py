"""PixPro: propagation, loss and teacher against loops and formulas."""

import itertools
import math

import pytest
import torch

from nnunet_cfcl.config import PretrainSettings, ViewSettings
from nnunet_cfcl.pretraining.objective import ImageViews
from nnunet_cfcl.pretraining.objectives.pixpro import PixProObjective, propagate
from nnunet_cfcl.views import ViewGeometry, crop_size, draw_affine_views, read_features, tissue_box

OBJECTIVE = PixProObjective(points=5, radius=0.1, momentum=0.9, sharpness=2.0)
SETTINGS = PretrainSettings(projection_hidden=5, projection_dim=4)


def build(network, dim: int = 2):
    torch.manual_seed(0)
    return OBJECTIVE.build_model(network(dim), 6, SETTINGS).double()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b / (a.norm() * b.norm())


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
def test_propagation_is_a_sum_over_the_valid_points_weighted_by_their_similarity(sharpness):
    x, g = random(2, 6, 3), random(2, 6, 3, seed=1)
    valid = torch.tensor([[True] * 6, [True, True, False, True, False, True]])
    found = propagate(x, g, valid, sharpness)
    for n, i in itertools.product(range(2), range(6)):
        parts = [max(cosine(x[n, i], x[n, j]).item(), 0) ** sharpness * g[n, j] for j in range(6) if valid[n, j]]
        torch.testing.assert_close(found[n, i], sum(parts))


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_propagation_has_the_right_gradient_also_where_the_power_has_none(sharpness):
    x, g = random(1, 4, 3).requires_grad_(), random(1, 4, 3, seed=1).requires_grad_()
    valid = torch.tensor([[True, True, False, True]])
    assert torch.autograd.gradcheck(lambda a, b: propagate(a, b, valid, sharpness), (x, g))
    opposite = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]], requires_grad=True)
    propagate(opposite, opposite, torch.ones(1, 3, dtype=torch.bool), sharpness).sum().backward()
    assert opposite.grad.isfinite().all()


def loop_loss(outputs, drawn) -> tuple[torch.Tensor, float]:
    """The objective and the share of valid points with a positive, point by point."""
    points, valid, reach = drawn["points"], drawn["valid"], drawn["reach"]
    images, views, count = valid.shape
    y, x = outputs.view(images, views, count, -1).chunk(2, dim=-1)
    losses, matched = [], set()
    for b in range(images):
        for v, w in itertools.combinations(range(views), 2):
            terms = []
            for i, j in itertools.product(range(count), range(count)):
                near = (points[b, v, i] - points[b, w, j]).norm() < reach[b]
                if near and valid[b, v, i] and valid[b, w, j]:
                    terms.append(-cosine(y[b, v, i], x[b, w, j]) - cosine(y[b, w, j], x[b, v, i]))
                    matched |= {(b, v, i), (b, w, j)}
            if terms:
                losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses), len(matched) / int(valid.sum())


def some_draws(images: int = 2, views: int = 3, points: int = 7, dim: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "points": torch.rand(images, views, points, dim, generator=generator) * 10,
        "valid": torch.rand(images, views, points, generator=generator) > 0.2,
        "reach": torch.full((images,), 2.5),
    }


@pytest.mark.parametrize("dim", [2, 3])
def test_the_loss_and_its_gradient_equal_a_loop_over_all_pairs_of_points(network, dim):
    drawn, z = some_draws(dim=dim), random(2 * 3 * 7, 8)
    one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    value, statistics = OBJECTIVE.loss(build(network), one, drawn)
    expected, share = loop_loss(other, drawn)
    torch.testing.assert_close(value, expected)
    assert 0 < share < 1 and statistics["positives"] == pytest.approx(share)
    value.backward()
    expected.backward()
    torch.testing.assert_close(one.grad[:, :4], other.grad[:, :4])
    assert (one.grad[:, 4:] == 0).all(), "nothing flows to the teacher"


def test_the_loss_is_minus_two_when_all_embeddings_agree_and_the_statistics_show_the_collapse(network):
    value, statistics = OBJECTIVE.loss(build(network), torch.ones(2 * 3 * 7, 8), some_draws())
    assert float(value) == pytest.approx(-2, abs=1e-5)
    assert statistics["alignment"] == pytest.approx(0, abs=1e-5)
    assert statistics["uniformity"] == pytest.approx(0, abs=1e-5)


def test_alignment_is_the_mean_squared_distance_of_positives(network):
    drawn, z = some_draws(images=1, views=2), random(2 * 7, 8)
    _, statistics = OBJECTIVE.loss(build(network), z, drawn)
    y, x = torch.nn.functional.normalize(z.view(2, 7, 2, 4), dim=-1).unbind(2)
    near = torch.cdist(drawn["points"][0, 0], drawn["points"][0, 1]) < 2.5
    near &= drawn["valid"][0, 0][:, None] & drawn["valid"][0, 1]
    distances = [
        ((y[0, i] - x[1, j]).square().sum() + (y[1, j] - x[0, i]).square().sum()) / 2 for i, j in near.nonzero()
    ]
    assert statistics["alignment"] == pytest.approx(float(sum(distances) / len(distances)))


def test_without_any_positive_the_loss_is_zero_with_zero_gradients(network):
    drawn = {**some_draws(), "reach": torch.zeros(2)}
    z = random(2 * 3 * 7, 8).requires_grad_()
    value, statistics = OBJECTIVE.loss(build(network), z, drawn)
    value.backward()
    assert value.item() == statistics["positives"] == statistics["alignment"] == 0 and (z.grad == 0).all()


def encoded_inputs(dim: int = 2) -> tuple[torch.Tensor, tuple[list[torch.Tensor], torch.Tensor]]:
    images = random(2, 1, *(6, 7, 5)[:dim], seed=3)
    points = torch.rand(2, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 1.6 - 0.8
    return images, (list(points), torch.tensor([[True] * 5, [True, False, True, True, False]]))


@pytest.mark.parametrize("dim", [2, 3])
def test_the_model_gives_propagated_and_taught_embeddings_side_by_side(network, dim):
    model, (images, (points, valid)) = build(network, dim), encoded_inputs(dim)
    with torch.no_grad():
        model.head[0].weight += 0.1  # the branches differ from here on
        found = model(images, (points, valid)).view(2, 5, 8)
        read = read_features(model.network(images), torch.stack(points))
        x = model.head(read)
        taught = model.teacher_head(read)
    torch.testing.assert_close(found[..., :4], propagate(x, model.transform(x), valid, 2.0))
    torch.testing.assert_close(found[..., 4:], taught)
    assert not torch.allclose(x, taught)


def test_invalid_points_change_no_other_embedding(network):
    model, (images, (points, valid)) = build(network), encoded_inputs()
    before = model(images, (points, valid)).view(2, 5, 8)
    points[1] = torch.where(valid[1][:, None], points[1], 0.0)
    after = model(images, (points, valid)).view(2, 5, 8)
    torch.testing.assert_close(before[valid], after[valid])
    assert not torch.allclose(before[~valid], after[~valid])


def test_the_teacher_is_a_copy_that_is_never_trained(network):
    model, (images, inputs) = build(network), encoded_inputs()
    teacher = {name: p for name, p in model.named_parameters() if name.startswith("teacher")}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("teacher_") for name in teacher} == {
        name for name in trained if name.startswith(("network", "head"))}
    assert all(torch.equal(p, trained[name.removeprefix("teacher_")]) for name, p in teacher.items())
    model(images, inputs).square().sum().backward()
    assert all(p.grad is None for p in teacher.values())
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.7, 1.0])
def test_the_teacher_follows_by_the_cosine_formula(network, progress):
    model = build(network)
    before = {name: p.clone() for name, p in model.named_parameters() if name.startswith("teacher")}
    with torch.no_grad():
        for parameter in [*model.network.parameters(), *model.head.parameters()]:
            parameter.add_(random(*parameter.shape, seed=5))
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * progress) + 1) / 2
    model.after_step(progress)
    now = dict(model.named_parameters())
    for name, old in before.items():
        trained = now[name.removeprefix("teacher_")]
        torch.testing.assert_close(now[name], momentum * old + (1 - momentum) * trained)
    assert momentum == pytest.approx({0.0: 0.9, 1.0: 1.0}.get(progress, momentum))


def test_the_teacher_is_saved_beside_the_network_and_restored(network):
    model, fresh = build(network), build(network)
    with torch.no_grad():
        for parameter in [*model.network.parameters(), *model.head.parameters()]:
            parameter.add_(1)
    model.after_step(0.5)
    state = {key: value.clone() for key, value in model.additions().items()}
    fresh.load_additions(state)
    assert any(key.startswith("teacher_network.") for key in state)
    assert not any(key.startswith("network.") for key in state)
    assert all(torch.equal(value, state[key]) for key, value in fresh.additions().items())


def test_a_compiled_network_has_a_compiled_teacher_with_the_same_keys(network):
    compiled = OBJECTIVE.build_model(torch.compile(network(), backend="eager"), 6, SETTINGS)
    assert list(compiled.additions()) == list(build(network).additions())
    assert compiled.teacher_network._compiled_call_impl is not None
    with torch.no_grad():
        for parameter in compiled.network.parameters():
            parameter.add_(1)
    compiled.after_step(0.0)
    for teacher, trained in zip(compiled.teacher_network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(trained - teacher, torch.full_like(trained, 0.9))


def test_points_lie_in_their_own_views_and_the_radius_is_in_millimetres_of_the_crop():
    geometry, settings = ViewGeometry((24, 40), (2.0, 0.5)), ViewSettings()
    generator, crop = torch.Generator().manual_seed(6), crop_size(geometry, settings)
    matrices = draw_affine_views(generator, geometry, settings, 3)
    tissue = tissue_box((0, 0), crop, crop, geometry.spacing)
    drawn = OBJECTIVE.draw(generator, ImageViews(matrices, geometry, crop, tissue))
    assert drawn["points"].shape == (3, 5, 2) and drawn["valid"].all()
    assert float(drawn["reach"]) == pytest.approx(0.1 * max(crop[0] * 2.0, crop[1] * 0.5))
    batch = {"drawn": {key: value[None] for key, value in drawn.items()}, "matrices": matrices[None]}
    coordinates, valid = OBJECTIVE.inputs(batch, [(0, 2), (0, 0)], torch.device("cpu"))
    assert all((part.abs() <= 1).all() for part in coordinates) and valid.all()
    back = coordinates[0].double() @ matrices[2, :, :2].double().T + matrices[2, :, 2].double()
    torch.testing.assert_close(back, drawn["points"][2].double(), atol=1e-4, rtol=0)
