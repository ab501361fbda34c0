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
from nnunet_cfcl.losses.blockwise import FLOAT32_BOUND, FLOAT64_BOUND, two_way_log_sum_exp


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


def test_a_second_derivative_is_refused_and_not_silently_wrong():
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
