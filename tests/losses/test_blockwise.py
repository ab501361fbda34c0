"""The blockwise log-sum-exp against the dense formula, and its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_cfcl.losses import blockwise
from nnunet_cfcl.losses.blockwise import (
    FLOAT32_BOUND,
    FLOAT64_BOUND,
    pool_log_sum_exp,
    rectangle_blocks,
    strips,
    triangle_blocks,
    two_way_log_sum_exp,
)


def _points(n: int, m: int, d=5, bound=3.0, seed=0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, m))
    x, y = bound * x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def _dense(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = x @ y.T
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def _gradients(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Gradients under weights that differ for every row and column and change sign."""
    total = sum((out * torch.linspace(-1, 2, len(out), dtype=out.dtype)).sum() for out in outputs)
    return torch.autograd.grad(total, inputs)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), m=st.integers(1, 20), side=st.integers(1, 25), seed=st.integers(0, 1000))
def test_values_and_gradients_equal_the_dense_formula_at_any_shape_and_block_side(n, m, side, seed):
    x, y = _points(n, m, seed=seed)
    ours, dense = two_way_log_sum_exp(x, y, 3.0, side), _dense(x, y)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(_gradients(ours, (x, y)), _gradients(dense, (x, y)), rtol=0, atol=1e-12)


def test_more_points_than_a_default_block_holds_equal_the_dense_formula():
    x, y = _points(blockwise._BLOCK_SIDE + 50, 30)
    ours, dense = two_way_log_sum_exp(x, y, 3.0), _dense(x, y)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(_gradients(ours, (x, y)), _gradients(dense, (x, y)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", [0.1, 20.0, FLOAT32_BOUND, 100.0, FLOAT64_BOUND])
def test_float32_is_accurate_at_every_bound(bound):
    x, y = _points(300, 170, bound=bound, dtype=torch.float32)
    ours = two_way_log_sum_exp(x, y, bound, 64)
    reference = _dense(x.double(), y.double())
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for got, want in zip(ours, reference):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    for got, want in zip(_gradients(ours, (x, y)), _gradients(reference, (x, y))):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_values_and_gradients_stay_finite_and_right_when_all_logits_sit_on_the_bound(sign):
    y = torch.zeros(2000, 2)
    y[:, 0] = 1.0
    x = (sign * FLOAT32_BOUND * y).requires_grad_()
    rows, columns = two_way_log_sum_exp(x, y, FLOAT32_BOUND)
    expected = torch.full((2000,), sign * FLOAT32_BOUND + torch.tensor(2000.0).log().item())
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(columns, expected)
    (dx,) = torch.autograd.grad((rows + columns).mean(), x)
    torch.testing.assert_close(dx, 2 * y / 2000)


def test_gradcheck_passes_for_both_inputs_over_several_blocks():
    inputs = _points(5, 4, d=3)
    assert torch.autograd.gradcheck(lambda x, y: two_way_log_sum_exp(x, y, 3.0, 2), inputs)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_input_alone_may_require_a_gradient(wanted):
    inputs = _points(7, 9)
    expected = _gradients(_dense(*inputs), inputs)[wanted]
    inputs[1 - wanted].requires_grad_(False)
    got = _gradients(two_way_log_sum_exp(*inputs, 3.0, 4), (inputs[wanted],))[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("direction", [0, 1])
def test_one_direction_alone_may_be_used(direction):
    inputs = _points(7, 9)
    got = torch.autograd.grad(two_way_log_sum_exp(*inputs, 3.0, 4)[direction].sum(), inputs)
    expected = torch.autograd.grad(_dense(*inputs)[direction].sum(), inputs)
    torch.testing.assert_close(got, expected)


def test_a_second_derivative_is_rejected():
    x, y = _points(3, 3)
    loss = two_way_log_sum_exp(x, y, 3.0)[0].mean()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype):
    x, y = _points(50, 40, dtype=dtype)
    reference = two_way_log_sum_exp(x.float(), y.float(), 4.0, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = two_way_log_sum_exp(x, y, 4.0, 16)
        gradients = _gradients(ours, (x, y))
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    torch.testing.assert_close(gradients, _gradients(reference, (x, y)), rtol=0, atol=0)
    assert gradients[0].dtype == dtype


def test_a_sum_over_nothing_is_minus_infinity():
    rows, columns = two_way_log_sum_exp(torch.ones(3, 2), torch.ones(0, 2), 2.0)
    assert torch.equal(rows, torch.full((3,), -torch.inf))
    assert columns.shape == (0,)


def _mask(n: int, m: int, seed: int) -> Tensor:
    """Excluded pairs; a row and a column have no pair left."""
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[0] = mask[:, -1] = True
    return mask


def _dense_masked(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `_dense`; where nothing is left, 0 in place of -inf, whose gradient is NaN in the dense formula."""
    logits = (x @ y.T).masked_fill(mask, -1e9)
    return tuple(
        torch.where(mask.all(dim=axis), 0, logits.logsumexp(dim=axis)) for axis in (1, 0)
    )


def _without_infinity(log_sums: Tensor) -> Tensor:
    assert not log_sums.isnan().any()
    return torch.where(log_sums.isneginf(), 0, log_sums)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), side=st.integers(1, 14), seed=st.integers(0, 1000))
def test_excluded_pairs_count_neither_forward_nor_backward(n, m, side, seed):
    x, y = _points(n, m, seed=seed)
    mask = _mask(n, m, seed)
    ours = two_way_log_sum_exp(x, y, 3.0, side, exclude=lambda i, j: mask[i, j])
    assert ours[0][0] == ours[1][-1] == -torch.inf
    ours, dense = tuple(map(_without_infinity, ours)), _dense_masked(x, y, mask)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(_gradients(ours, (x, y)), _gradients(dense, (x, y)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3, 7, 13, 50, None])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_the_pool_equals_the_dense_formula_without_its_diagonal(n, side, masked):
    z, _ = _points(n, 1, bound=1.7)
    mask = torch.eye(n, dtype=torch.bool)
    if masked:
        mask |= _mask(n, n, 0) & _mask(n, n, 0).T
    ours = _without_infinity(pool_log_sum_exp(z, 3.0, side, exclude=(lambda i, j: mask[i, j]) if masked else None))
    dense = _dense_masked(z, z, mask)[0]
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(_gradients((ours,), (z,)), _gradients((dense,), (z,)), rtol=0, atol=1e-12)


def test_gradcheck_passes_for_the_pool_over_several_blocks():
    z, _ = _points(7, 1, d=3, bound=1.5)
    assert torch.autograd.gradcheck(lambda z: pool_log_sum_exp(z, 3.0, 3), z)


@pytest.mark.parametrize("bound", [0.1, FLOAT32_BOUND, 100.0, FLOAT64_BOUND])
def test_the_pool_is_accurate_in_float32_at_every_bound(bound):
    z, _ = _points(300, 1, bound=bound**0.5, dtype=torch.float32)
    ours, reference = pool_log_sum_exp(z, bound, 64), pool_log_sum_exp(z.double(), bound)
    torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-5)
    (got,), (want,) = _gradients((ours,), (z,)), _gradients((reference,), (z,))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_a_pool_of_one_or_no_point_is_minus_infinity_and_has_zero_gradients():
    for n in (0, 1):
        z = torch.ones(n, 3, requires_grad=True)
        log_sums = pool_log_sum_exp(z, 3.0)
        assert torch.equal(log_sums, torch.full((n,), -torch.inf))
        log_sums.sum().backward()
        assert torch.equal(z.grad, torch.zeros(n, 3))


def test_a_second_derivative_of_the_pool_is_rejected():
    z, _ = _points(3, 1)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(pool_log_sum_exp(z, 9.0).mean(), z, create_graph=True)


@pytest.mark.parametrize("points", [0, 1, 7, 12])
@pytest.mark.parametrize("side", [1, 3, 4, 20])
def test_blocks_cover_every_pair_once(points, side):
    whole, upper = torch.zeros(points, 9), torch.zeros(points, points)
    for i, j in rectangle_blocks(points, 9, side):
        whole[i, j] += 1
    for i, j in triangle_blocks(points, side):
        upper[i, j] += 1
        if i != j:
            upper[j, i] += 1
    assert (whole == 1).all() and (upper == 1).all()


@pytest.mark.parametrize(("points", "side"), [(10, 3), (4097, 4096), (9, 9)])
def test_strips_are_of_nearly_one_length(points, side):
    lengths = [strip.stop - strip.start for strip in strips(points, side)]
    assert sum(lengths) == points and max(lengths) <= side and max(lengths) - min(lengths) <= 1


class _LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("side", [16, 50])
def test_no_tensor_is_larger_than_a_block_or_the_points(side):
    x, y = _points(300, 400)
    with _LargestTensor() as largest:
        torch.stack([out.sum() for out in two_way_log_sum_exp(x, y, 3.0, side)]).sum().backward()
    assert largest.elements == max(side * side, y.numel())


@pytest.mark.parametrize("side", [16, 50])
def test_no_tensor_of_the_pool_is_larger_than_a_block_or_the_points(side):
    z, _ = _points(300, 1)
    with _LargestTensor() as largest:
        pool_log_sum_exp(z, 9.0, side).sum().backward()
    assert 0 < largest.elements <= max(side * side, z.numel())


_PEAK = """
import torch
from nnunet_cfcl.losses import two_way_log_sum_exp

def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

def step(n):
    x = torch.nn.functional.normalize(torch.randn(n, 8)).requires_grad_()
    rows, columns = two_way_log_sum_exp(x, x, 1.0, 1000)
    (rows + columns).sum().backward()

torch.set_num_threads(1)
step(2000)
before = kilobytes("VmHWM")
step(12_000)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_process_stays_far_below_one_matrix_of_all_pairs():
    added = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True).stdout
    matrix_kilobytes = 12_000**2 * 4 / 1024
    assert int(added) < 0.05 * matrix_kilobytes


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 4), {}, r"x and y must be \(N, d\) and \(M, d\), got \(2, 3, 4\)"),
        (torch.ones(2, 3), torch.ones(2, 4), {}, r"x and y must be"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), {}, "share a floating type"),
        (torch.ones(2, 3).int(), torch.ones(2, 3).int(), {}, "share a floating type"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), {}, "and a device"),
        (torch.ones(2, 3), torch.ones(2, 3), {"bound": 501.0}, r"bound must lie in \(0, 500\], got 501"),
        (torch.ones(2, 3), torch.ones(2, 3), {"bound": float("nan")}, "bound must lie"),
        (torch.ones(2, 3), torch.ones(2, 3), {"block_side": 0}, "block_side must be at least 1, got 0"),
    ],
)
def test_unfit_input_is_a_readable_error(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        two_way_log_sum_exp(x, y, **{"bound": 3.0, **options})
