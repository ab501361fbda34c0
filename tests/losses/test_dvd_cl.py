"""DVD-CL against a double loop, closed forms and its symmetries."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnunet_cfcl.losses import blockwise, dvd_cl, dvd_cl_loss

seeds = st.integers(0, 10_000)


def _pair(batch: int = 2, points: int = 3, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(batch, points, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.requires_grad_(), b.requires_grad_()


def _valid(batch: int, points: int, seed: int) -> Tensor:
    return torch.rand(batch, points, generator=torch.Generator().manual_seed(seed)) < 0.6


def _loop_oracle(a: Tensor, b: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """The definition as a double loop: every anchor of every direction, every candidate, one cosine at a time."""
    batch, points, _ = a.shape
    places = [(i, p) for i in range(batch) for p in range(points) if valid is None or valid[i, p]]
    total = torch.zeros((), dtype=torch.float64)
    for anchors, candidates in ((a, b), (b, a)):
        for place in places:
            denominator = torch.zeros((), dtype=torch.float64)
            for other in places:
                u, v = anchors[place], candidates[other]
                exponential = torch.exp(u.dot(v) / (u.dot(u) * v.dot(v)).sqrt() / temperature)
                denominator = denominator + exponential
                if other == place:
                    numerator = exponential
            total = total - torch.log(numerator / denominator) / len(places)
    return total


def _dense_oracle(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    x, y = (torch.nn.functional.normalize(z.flatten(0, 1), dim=1) for z in (a, b))
    logits, target = x @ y.T / temperature, torch.arange(len(x))
    return sum(torch.nn.functional.cross_entropy(side, target) for side in (logits, logits.T))


def _assert_same_value_and_gradient(ours: Tensor, oracle: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(oracle, inputs), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.7, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_equal_a_double_loop_over_anchors_and_candidates(temperature, masked):
    a, b = _pair(3, 4)
    valid = _valid(3, 4, seed=1) if masked else None
    ours = dvd_cl_loss(a, b, temperature, valid).loss
    _assert_same_value_and_gradient(ours, _loop_oracle(a, b, temperature, valid), a, b)


def test_value_and_gradient_equal_the_dense_formula_at_a_thousand_points(monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK_SIDE", 300)
    a, b = _pair(4, 300, 16)
    _assert_same_value_and_gradient(dvd_cl_loss(a, b).loss, _dense_oracle(a, b, 0.7), a, b)


def test_float32_equals_the_float64_dense_formula_to_single_precision():
    a, b = _pair(4, 400, 16)
    expected = torch.autograd.grad(_dense_oracle(a, b, 0.07), (a, b))
    single = [z.detach().float().requires_grad_() for z in (a, b)]
    loss = dvd_cl_loss(*single, 0.07).loss
    assert loss.dtype == torch.float32
    assert abs(loss.item() - _dense_oracle(a, b, 0.07).item()) < 1e-5
    for got, want in zip(torch.autograd.grad(loss, single), expected):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_gradcheck_passes_with_a_mask_and_blocks_smaller_than_the_batch(monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK_SIDE", 2)
    valid = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda a, b: dvd_cl_loss(a, b, 0.3, valid).loss, _pair())


def test_equal_embeddings_give_two_log_n():
    a = torch.ones(3, 5, 7, dtype=torch.float64)
    assert dvd_cl_loss(a, 4 * a).loss.item() == pytest.approx(2 * math.log(15), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_orthonormal_points_give_the_closed_form(temperature):
    a = torch.eye(6, dtype=torch.float64).reshape(2, 3, 6)
    expected = 2 * math.log1p(5 * math.exp(-1 / temperature))
    assert dvd_cl_loss(a, a, temperature).loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_single_point_has_no_negative_and_costs_nothing():
    a, b = _pair(1, 1)
    assert dvd_cl_loss(a, b).loss.item() == pytest.approx(0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, temperature=st.floats(0.05, 2))
def test_swapping_the_views_changes_nothing(seed, temperature):
    a, b = _pair(seed=seed)
    torch.testing.assert_close(dvd_cl_loss(a, b, temperature).loss, dvd_cl_loss(b, a, temperature).loss)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_permuting_points_of_the_whole_batch_permutes_gradients_alone(seed):
    a, b = _pair(seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = [z.detach().flatten(0, 1)[order].reshape(2, 3, 4).requires_grad_() for z in (a, b)]
    loss, moved_loss = dvd_cl_loss(a, b).loss, dvd_cl_loss(*moved).loss
    torch.testing.assert_close(moved_loss, loss)
    for gradient, got in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(moved_loss, moved)):
        torch.testing.assert_close(got.flatten(0, 1), gradient.flatten(0, 1)[order])


@settings(max_examples=20, deadline=None)
@given(seed=seeds, exponent=st.floats(-3, 3))
def test_the_length_of_each_embedding_does_not_matter(seed, exponent):
    a, b = _pair(seed=seed)
    lengths = 10 ** (exponent * torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(dvd_cl_loss(a * lengths, b / lengths).loss, dvd_cl_loss(a, b).loss)


@pytest.mark.parametrize("side", [1, 2, 5, 12, 100])
def test_the_block_side_never_changes_the_result(monkeypatch, side):
    a, b = _pair(3, 4)
    expected = dvd_cl_loss(a, b, 0.1).loss
    monkeypatch.setattr(blockwise, "_BLOCK_SIDE", side)
    _assert_same_value_and_gradient(dvd_cl_loss(a, b, 0.1).loss, expected, a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("length", [1.0, 1000.0])
def test_half_precision_is_finite_and_close_at_low_temperature(dtype, temperature, length):
    a, b = (length * z.detach() for z in _pair(4, 50, 32))
    b = a + 0.1 * b
    expected = dvd_cl_loss(a.to(dtype).double(), b.to(dtype).double(), temperature).loss
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dvd_cl_loss(a, b, temperature).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_a_valid_mask_equals_dropping_the_points_and_their_gradient(seed):
    a, b = _pair(3, 4, seed=seed)
    valid = _valid(3, 4, seed)
    valid[0, 0] = True
    ours = dvd_cl_loss(a, b, valid=valid).loss
    _assert_same_value_and_gradient(ours, dvd_cl_loss(a[valid][None], b[valid][None]).loss, a, b)


def test_nan_at_an_invalid_point_is_never_read():
    a, b = _pair()
    valid = torch.ones(2, 3, dtype=torch.bool)
    valid[1, 2] = False
    a = torch.where(valid[..., None], a, torch.nan).detach().requires_grad_()
    dvd_cl_loss(a, b, valid=valid).loss.backward()
    assert torch.equal(a.grad[1, 2], torch.zeros(4, dtype=torch.float64))
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_valid_point_gives_a_zero_with_a_graph(dtype):
    a, b = (z.detach().to(dtype).requires_grad_() for z in _pair())
    with torch.no_grad():
        a[0, 0] = torch.nan
    loss = dvd_cl_loss(a, b, valid=torch.zeros(2, 3, dtype=torch.bool)).loss
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(a.grad, torch.zeros_like(a)) and torch.equal(b.grad, torch.zeros_like(b))


def test_an_embedding_of_zeros_has_a_finite_gradient():
    a, b = (z.detach().float() for z in _pair())
    a[0, 1] = 0
    a.requires_grad_()
    dvd_cl_loss(a, b).loss.backward()
    assert a.grad.isfinite().all()


def test_gradient_descent_on_the_loss_aligns_the_views():
    a, b = _pair(2, 8, 8)
    optimiser = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        dvd_cl_loss(a, b, 0.1).loss.backward()
        optimiser.step()
    x, y = (torch.nn.functional.normalize(z.detach().flatten(0, 1), dim=1) for z in (a, b))
    assert torch.equal((x @ y.T).argmax(dim=1), torch.arange(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.ones(2, 4, 4)}, r"both be \(B, P, d\), got \(2, 3, 4\) and \(2, 4, 4\)"),
        ({"a": torch.ones(6, 4), "b": torch.ones(6, 4)}, r"both be \(B, P, d\)"),
        ({"b": torch.ones(2, 3, 4).half()}, "share a floating type and a device"),
        ({"a": torch.ones(2, 3, 4).long(), "b": torch.ones(2, 3, 4).long()}, "share a floating type"),
        ({"valid": torch.ones(2, 3)}, r"valid must be bool \(2, 3\), got torch.float32 \(2, 3\)"),
        ({"valid": torch.ones(3, 2, dtype=torch.bool)}, r"valid must be bool \(2, 3\)"),
        ({"temperature": 0.0}, "temperature must be finite and at least 0.002, got 0"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 0.001}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
    ],
)
def test_unfit_input_is_a_readable_error_of_one_line(change, message):
    arguments = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 3, 4), **change}
    with pytest.raises(ValueError, match=message) as error:
        dvd_cl_loss(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [blockwise, dvd_cl])
def test_the_documented_example_runs(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("radius", [0.2, 0.5, 10.0])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("side", [3, 4096])
def test_the_ignore_band_equals_the_double_loop(objectives, draw_problem, assert_same, monkeypatch, radius, beta, side):
    monkeypatch.setattr(blockwise, "_BLOCK_SIDE", side)
    problem, options = draw_problem(points=5), {"ignore_radius": radius, "hard_negatives": beta}
    dvd = objectives["dvd"]
    assert_same(dvd.loss(problem, **options), dvd.oracle(problem, **options), problem.z)


def test_the_ignore_band_leaves_the_positive_and_other_images_in():
    a = torch.eye(4, dtype=torch.float64).reshape(2, 2, 4)
    positions = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 90.0]]])
    near, far = math.log(math.e + 2) - 1, math.log(math.e + 3) - 1
    loss = dvd_cl_loss(a, a, 1.0, positions=positions, ignore_radius=5.1).loss
    assert loss.item() == pytest.approx(2 * (near + far) / 2, abs=1e-12)
    at_the_radius = dvd_cl_loss(a, a, 1.0, positions=positions, ignore_radius=5.0).loss
    assert at_the_radius.item() == pytest.approx(2 * far, abs=1e-12)


def test_without_a_radius_positions_are_not_read():
    a, b = _pair()
    assert torch.equal(dvd_cl_loss(a, b, positions=torch.zeros(1)).loss, dvd_cl_loss(a, b).loss)


def test_hard_negatives_raise_the_share_of_near_negatives_in_the_gradient():
    near, far = torch.tensor([0.9, 0.1]), torch.tensor([-0.9, 0.1])
    pull = []
    for beta in (0.0, 5.0):
        b = torch.stack([torch.tensor([0.0, 1.0]), near, far])[None].requires_grad_()
        a = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
        weights = torch.tensor([[1.0, 0.0, 0.0]])
        (gradient,) = torch.autograd.grad(dvd_cl_loss(a, b, 1.0, weights=weights, hard_negatives=beta).loss, b)
        pull.append(gradient[0, 1].norm() / gradient[0, 2].norm())
    assert pull[1] > 10 * pull[0] > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_radius": 3.0}, "ignore_radius 3 needs the positions of the points"),
        ({"ignore_radius": -1.0}, "ignore_radius must be finite and not negative, got -1"),
        ({"ignore_radius": math.nan}, "ignore_radius must be finite and not negative, got nan"),
        ({"ignore_radius": math.inf}, "ignore_radius must be finite and not negative, got inf"),
        ({"ignore_radius": 1.0, "positions": torch.ones(2, 4, 3)}, r"positions must be floating \(2, 3, D\)"),
    ],
)
def test_an_unfit_ignore_band_is_a_readable_error(options, message):
    with pytest.raises(ValueError, match=message):
        dvd_cl_loss(*_pair(), **options)
