"""What holds for every objective: the definition as a double loop, options, symmetries, precision, empty cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_cfcl.losses import CountedLoss, blockwise, pair_rules
from nnunet_cfcl.losses.embeddings import MIN_TEMPERATURE, unit_embeddings

seeds = st.integers(0, 10_000)
once = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_equal_the_double_loop(objective, draw_problem, assert_same, temperature, masked, weighted):
    problem = draw_problem(masked=masked, weighted=weighted)
    ours, oracle = (f(problem, temperature=temperature) for f in (objective.loss, objective.oracle))
    assert_same(ours, oracle, problem.z)


@once
@given(seed=seeds, batch=st.integers(1, 3), points=st.integers(1, 4), side=st.integers(1, 9))
def test_value_and_gradient_equal_the_double_loop_for_any_number_of_points_and_blocks(
    objective, draw_problem, assert_same, seed, batch, points, side
):
    problem = draw_problem(seed, batch, 2, points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_BLOCK_SIDE", side)
        patch.setattr(pair_rules, "_STRIP_PAIRS", side)
        assert_same(objective.loss(problem), objective.oracle(problem), problem.z)


@pytest.mark.parametrize("beta", [0.5, 10.0])
@pytest.mark.parametrize("temperature", [0.05, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hard_negatives_equal_the_double_loop(point_objective, draw_problem, assert_same, beta, temperature, seed):
    problem, options = draw_problem(seed), {"temperature": temperature, "hard_negatives": beta}
    assert_same(point_objective.loss(problem, **options), point_objective.oracle(problem, **options), problem.z)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_hard_negatives_survive_anchors_without_a_negative(point_objective, draw_problem, assert_same, beta):
    problem = draw_problem(batch=1, points=2)
    problem = replace(
        problem, labels=torch.ones_like(problem.labels), positions=torch.zeros_like(problem.positions), valid=None)
    options = {"hard_negatives": beta}
    assert_same(point_objective.loss(problem, **options), point_objective.oracle(problem, **options), problem.z)


def test_hard_negatives_without_weight_change_nothing_in_the_limit(point_objective, draw_problem, assert_same):
    problem = draw_problem()
    almost = point_objective.loss(problem, hard_negatives=1e-7)
    assert_same(almost, point_objective.loss(problem), problem.z, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_a_temperature_that_is_a_tensor_receives_the_gradient(objective, draw_problem, assert_same, beta):
    problem, temperature = draw_problem(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"hard_negatives": beta} if beta and objective.name != "nt_xent" else {}
    ours, oracle = (f(problem, temperature=temperature, **options) for f in (objective.loss, objective.oracle))
    assert_same(ours, oracle, problem.z, temperature)
    assert torch.autograd.grad(objective.loss(problem, temperature=temperature), temperature)[0] != 0


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_gradcheck_passes_over_several_blocks(point_objective, draw_problem, monkeypatch, beta):
    monkeypatch.setattr(blockwise, "_BLOCK_SIDE", 3)
    problem = draw_problem(batch=2, points=3)
    assert torch.autograd.gradcheck(
        lambda z: point_objective.loss(replace(problem, z=z), hard_negatives=beta), problem.z)


@pytest.mark.parametrize("side", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_the_block_side_never_changes_the_result(point_objective, draw_problem, assert_same, monkeypatch, side, beta):
    problem = draw_problem()
    expected = point_objective.loss(problem, hard_negatives=beta)
    monkeypatch.setattr(blockwise, "_BLOCK_SIDE", side)
    assert_same(point_objective.loss(problem, hard_negatives=beta), expected, problem.z)


@once
@given(seed=seeds)
def test_permuting_images_and_points_permutes_gradients_alone(objective, draw_problem, seed):
    problem, g = draw_problem(seed), torch.Generator().manual_seed(seed)
    images, points = torch.randperm(3, generator=g), torch.randperm(4, generator=g)
    if objective.name == "nt_xent":  # whose image is made of the first point
        points = torch.arange(4)
    fields = {k: v.detach()[images][:, :, points] for k, v in vars(problem).items()}
    moved = replace(problem, **fields)
    moved.z.requires_grad_()
    loss, moved_loss = objective.loss(problem), objective.loss(moved)
    torch.testing.assert_close(moved_loss, loss)
    (gradient,), (got,) = torch.autograd.grad(loss, problem.z), torch.autograd.grad(moved_loss, moved.z)
    torch.testing.assert_close(got, gradient[images][:, :, points])


@once
@given(seed=seeds, exponent=st.floats(-3, 3))
def test_the_length_of_each_embedding_does_not_matter(objective, draw_problem, seed, exponent):
    problem = draw_problem(seed)
    lengths = 10 ** (exponent * torch.rand(3, 2, 4, 1, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(objective.loss(replace(problem, z=problem.z * lengths)), objective.loss(problem))


@once
@given(seed=seeds, factor=st.floats(0.1, 1))
def test_a_common_factor_of_the_weights_does_not_matter(point_objective, draw_problem, seed, factor):
    problem = draw_problem(seed)
    scaled = replace(problem, weights=problem.weights * factor)
    torch.testing.assert_close(point_objective.loss(scaled), point_objective.loss(problem))


@once
@given(seed=seeds)
def test_weights_of_one_change_nothing(point_objective, draw_problem, seed):
    problem = draw_problem(seed, weighted=False)
    ones = replace(problem, weights=torch.ones(3, 2, 4, dtype=torch.float16))
    torch.testing.assert_close(point_objective.loss(ones), point_objective.loss(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("length", [1.0, 1000.0])
def test_half_precision_is_finite_and_close_at_low_temperature(objective, draw_problem, dtype, temperature, length):
    problem = draw_problem(points=8, d=32)
    halved = (length * problem.z.detach()).to(dtype)
    expected = objective.loss(replace(problem, z=halved.double()), temperature=temperature)
    halved.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective.loss(replace(problem, z=halved), temperature=temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    assert halved.grad.isfinite().all() and halved.grad.any()


def test_float32_equals_float64_to_single_precision(objective, draw_problem):
    problem = draw_problem(points=30, d=16)
    expected = objective.loss(problem)
    single = replace(problem, z=problem.z.detach().float().requires_grad_(), weights=problem.weights.float())
    loss = objective.loss(single)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    (got,), (wanted,) = torch.autograd.grad(loss, single.z), torch.autograd.grad(expected, problem.z)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("case", ["no valid point", "no weight", "no positive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_anchor_with_a_positive_gives_a_zero_with_a_graph(point_objective, draw_problem, case, beta, dtype):
    problem = draw_problem(masked=False, weighted=False)
    problem = replace(problem, z=problem.z.detach().to(dtype).requires_grad_())
    if case == "no valid point":
        problem = replace(problem, valid=torch.zeros(3, 2, 4, dtype=torch.bool))
        with torch.no_grad():
            problem.z[0, 0, 0] = torch.nan
    if case == "no weight":
        problem = replace(problem, weights=torch.zeros(3, 2, 4))
    if case == "no positive":
        if point_objective.name == "dvd":
            pytest.skip("a point of DVD-CL always has its positive")
        distinct = torch.arange(24.0).reshape(3, 2, 4)
        problem = replace(problem, labels=distinct.long() + 1, positions=distinct[..., None])
    found = point_objective.compute(problem, hard_negatives=beta)
    found.loss.backward()
    assert found.loss.item() == 0 and found.with_positive == 0
    assert found.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(problem.z.grad, torch.zeros_like(problem.z))


def test_background_alone_has_no_anchors(objectives, draw_problem):
    for name in ("s_dvd", "s_mvd"):
        problem = draw_problem(weighted=False)
        found = objectives[name].compute(replace(problem, labels=torch.zeros_like(problem.labels)))
        found.loss.backward()
        assert found.loss.item() == found.anchors == found.with_positive == 0
        assert torch.equal(problem.z.grad, torch.zeros_like(problem.z))


def test_nan_at_an_invalid_point_is_never_read(point_objective, draw_problem):
    problem = draw_problem(weighted=False)
    valid = torch.ones(3, 2, 4, dtype=torch.bool)
    valid[1, :, 2] = False
    z = torch.where(valid[..., None], problem.z, torch.nan).detach().requires_grad_()
    weights = torch.where(valid, 1.0, torch.nan)
    point_objective.loss(replace(problem, z=z, valid=valid, weights=weights)).backward()
    assert torch.equal(z.grad[1, :, 2], torch.zeros(2, 4, dtype=torch.float64))
    assert z.grad.isfinite().all() and z.grad.any()


def test_a_weight_counts_for_anchors_and_positives_and_not_for_negatives(objectives, draw_problem, assert_same):
    problem = draw_problem(seed=3, masked=False, weighted=False)
    weights = torch.ones(3, 2, 4, dtype=torch.float64)
    weights[0, 0, 1] = 0
    weighted = replace(problem, weights=weights)
    dropped = replace(problem, valid=weights > 0)
    # the point still is a negative of the others, so leaving it out altogether is something else
    assert objectives["s_mvd"].loss(weighted) > objectives["s_mvd"].loss(dropped)
    assert_same(objectives["s_mvd"].loss(weighted), objectives["s_mvd"].oracle(weighted), problem.z)


def test_anchors_and_those_with_a_positive_are_counted(objectives, draw_problem):
    problem = draw_problem(batch=1, views=2, points=3, masked=False, weighted=False)
    problem = replace(
        problem,
        labels=torch.tensor([[[0, 1, 2], [0, 1, -1]]]),
        positions=torch.tensor([[[0.0, 0.5, 1.0], [0.05, 0.3, 0.7]]])[..., None],
        weights=torch.tensor([[[1.0, 0.5, 0.2], [1.0, 0.5, 0.2]]]),
    )
    expected = {"dvd": (6, 6), "mvd": (6, 2), "s_dvd": (3, 2), "s_mvd": (3, 2), "nt_xent": (2, 2)}
    for name, counts in expected.items():
        options = {"radius": 0.1} if name == "mvd" else {}
        found = objectives[name].compute(problem, **options)
        assert isinstance(found, CountedLoss)
        assert (int(found.anchors), int(found.with_positive)) == counts, name


def test_a_second_derivative_is_rejected(objective, draw_problem):
    problem = draw_problem()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(objective.loss(problem), problem.z, create_graph=True)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"z": torch.ones(3, 2, 4, 4).long()}, {}, "must share a floating type"),
        ({"valid": torch.ones(3, 2, 4)}, {}, r"valid must be bool \(3, (2, )?4\), got torch.float32"),
        ({"weights": torch.ones(3, 2, 3)}, {}, r"weights must be floating \(3, (2, )?4\)"),
        ({"weights": torch.full((3, 2, 4), 1.5)}, {}, r"weights must lie in \[0, 1\], got 1.5 to 1.5"),
        ({"weights": torch.full((3, 2, 4), torch.nan)}, {}, r"weights must lie in \[0, 1\]"),
        ({}, {"temperature": 0.0}, "temperature must be finite and at least 0.002, got 0"),
        ({}, {"temperature": torch.tensor(float("nan"))}, "temperature must be finite and at least 0.002, got nan"),
        ({}, {"temperature": torch.ones(2)}, "temperature must be a number or a scalar tensor"),
        ({}, {"hard_negatives": -1.0}, r"hard_negatives must lie in \[0, 498.571\] at temperature 0.7, got -1"),
        ({}, {"hard_negatives": 499.0}, r"hard_negatives must lie in \[0, 498"),
    ],
)
def test_unfit_input_is_a_readable_error_of_one_line(point_objective, draw_problem, change, options, message):
    with pytest.raises(ValueError, match=message) as error:
        point_objective.loss(replace(draw_problem(), **change), **options)
    assert "\n" not in str(error.value)


def test_unit_embeddings_are_scaled_along_the_last_axis():
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit_embeddings(z).norm(dim=-1), torch.ones(2, 3))


def test_the_smallest_temperature_is_accepted(objective, draw_problem):
    assert objective.loss(draw_problem(), temperature=MIN_TEMPERATURE).isfinite()


def test_points_without_weight_are_not_counted_as_anchors(point_objective, draw_problem):
    problem = draw_problem(masked=False, weighted=False)
    problem = replace(problem, labels=torch.ones_like(problem.labels), weights=torch.ones(3, 2, 4))
    some = replace(problem, weights=torch.ones(3, 2, 4).index_fill(2, torch.tensor([0]), 0.0))
    assert int(point_objective.compute(some).anchors) == int(point_objective.compute(problem).anchors) * 3 // 4
