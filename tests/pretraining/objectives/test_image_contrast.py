"""SimCLR: pooling, pairing of views, statistics."""

import itertools
import math

import pytest
import torch

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.pretraining.objective import ImageViews
from nnunet_cfcl.pretraining.objectives.image_contrast import ImageContrastObjective
from nnunet_cfcl.views import ViewGeometry

OBJECTIVE = ImageContrastObjective(temperature=0.5)


def build(network, dim: int = 2, **settings):
    torch.manual_seed(0)
    chosen = PretrainSettings(projection_hidden=5, projection_dim=4, **settings)
    return OBJECTIVE.build_model(network(dim), 6, chosen).double()


def drawn(images: int, views: int) -> dict[str, torch.Tensor]:
    return {"views": torch.full((images,), views)}


def loop_loss(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """z (B, V, d); every view against every other one of the batch, in plain loops."""
    flat, images = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1), len(z)
    owner = [b for b in range(images) for _ in range(z.shape[1])]
    losses = []
    for a, anchor in enumerate(flat):
        others = [c for c in range(len(flat)) if c != a]
        scores = {c: anchor @ flat[c] / temperature for c in others}
        denominator = sum(scores[c].exp() for c in others).log()
        positives = [c for c in others if owner[c] == owner[a]]
        losses.append(sum(denominator - scores[p] for p in positives) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("views", [2, 4])
def test_the_loss_and_its_gradient_equal_a_loop_over_all_views(network, views):
    z = torch.randn(3 * views, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(views))
    one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    value, statistics = OBJECTIVE.loss(build(network), one, drawn(3, views))
    expected = loop_loss(other.view(3, views, 4), 0.5)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad)
    unit = torch.nn.functional.normalize(z, dim=-1).view(3, views, 4)
    distances = [(p - q).square().sum() for image in unit for p, q in itertools.combinations(image, 2)]
    assert statistics["alignment"] == pytest.approx(float(torch.stack(distances).mean()))
    assert statistics["positives"] == 1 and "temperature" not in statistics


def test_equal_embeddings_give_the_uninformed_loss_and_a_uniformity_of_zero(network):
    value, statistics = OBJECTIVE.loss(build(network), torch.ones(12, 4), drawn(4, 3))
    assert float(value) == pytest.approx(statistics["uninformed"], abs=1e-5) == pytest.approx(math.log(11), abs=1e-5)
    assert statistics["uniformity"] == pytest.approx(0, abs=1e-5) and statistics["alignment"] == 0


@pytest.mark.parametrize("dim", [2, 3])
def test_features_are_averaged_over_space_before_the_head(network, dim):
    model = build(network, dim)
    images = torch.randn(2, 1, *(6, 4, 5)[:dim], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pooled = model.network(images).mean(tuple(range(2, dim + 2)))
    torch.testing.assert_close(model(images, None), model.head(pooled))


def test_a_learned_temperature_starts_at_the_given_value_gets_a_gradient_and_is_reported(network):
    model = build(network, learn_temperature=True)
    (logarithm,) = model.loss_parameters()
    z = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    value, statistics = OBJECTIVE.loss(model, z, drawn(2, 2))
    value.backward()
    assert statistics["temperature"] == pytest.approx(0.5) and logarithm.grad.abs() > 0
    assert not list(build(network).loss_parameters())


def test_all_views_of_an_image_are_drawn_as_one_number():
    image = ImageViews(torch.zeros(3, 2, 3), ViewGeometry((8, 8), (1.0, 1.0)), (8, 8), torch.zeros(2, 2))
    assert OBJECTIVE.draw(torch.Generator(), image)["views"] == 3
    assert OBJECTIVE.inputs({}, [(0, 0)], torch.device("cpu")) is None
