"""Dispatch of `blockwise` to Triton kernels.

The kernels are used for float32 on NVIDIA GPUs if Triton is installed (PyTorch for Linux includes it) and no pairs are
excluded, after they have matched the plain formula on a small problem, once per GPU, width and precision. If they do
not match, a warning is issued once and the blocks of `blockwise` are used. Products follow
``torch.set_float32_matmul_precision``, as in PyTorch: "high" and "medium" use TF32 (three decimal digits per product,
sums in float32). "highest", the default, uses three TF32 products for one, which is as accurate as float32, on Hopper;
other GPUs have too few registers for it and visit the blocks.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from nnunet_cfcl.errors import first_line, isolated
from nnunet_cfcl.losses.ranks import Share
from nnunet_cfcl.losses.triton_launch import Launch, Precision, candidate_tiles

#: Largest width whose tiles fit into the shared memory of a multiprocessor twice.
MAX_WIDTH = 256

_LOG2_E = 1 / math.log(2)

# Largest rounding difference of log-sums, and of gradients relative to the largest gradient.
_TOLERANCE = {"tf32": 3e-3, "tf32x3": 5e-5}


def launch_for(x: Tensor, share: Share) -> Launch | None:
    """Select the launch for points like x (N, d), equal on all processes; None: the kernels do not support them."""
    if not _supported(x):
        return None
    exact = torch.get_float32_matmul_precision() == "highest"
    return _agreed_launch(x.device, x.shape[1], "tf32x3" if exact else "tf32", share)


def row_sums(x: Tensor, y: Tensor, launch: Launch, share: Share, pool: bool = False) -> Tensor:
    """Compute the sums (N,) over j of exp(x_i . y_j), without j = i in a pool; zero in rows of other processes."""
    out = x.new_zeros(len(x))
    _kernels().write_row_sums((x * _LOG2_E).contiguous(), y.contiguous(), out, launch, share, pool)
    return out


def gradient(
    x: Tensor, y: Tensor, row_weight: Tensor, column_weight: Tensor, launch: Launch, share: Share, pool: bool = False
) -> Tensor:
    """Compute the sums (N, d) over j of exp(x_i . y_j) (row_weight_i + column_weight_j) y_j; zero in rows of other
    processes."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    _kernels().write_gradient(
        (x * _LOG2_E).contiguous(), y.contiguous(), row_weight, column_weight, out, launch, share, pool
    )
    return out


def _supported(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and x.dtype == torch.float32 and 0 < x.shape[1] <= MAX_WIDTH


def _kernels() -> ModuleType:
    # Triton takes a second to import, and is not installed with every PyTorch
    from nnunet_cfcl.losses import triton_kernels

    return triton_kernels


@cache
def _agreed_launch(device: torch.device, width: int, precision: Precision, share: Share) -> Launch | None:
    """Select a launch on which all processes agree, since they share the tiles; None if their GPUs differ."""
    launch = _working_launch(device, width, precision)
    tile = launch.rows * launch.columns if launch else 0
    return launch if share.all_have(tile, device) else None


@cache
def _working_launch(device: torch.device, width: int, precision: Precision) -> Launch | None:
    """Select the first launch that matches the plain formula."""
    try:
        _kernels()
    except ImportError:
        return None
    problems = []
    for tile in candidate_tiles(device, precision):
        launch = Launch(*tile, precision=precision)
        with isolated() as errors:  # a compiler or a driver may raise anything
            difference = _difference(device, width, launch)
        if errors:
            problems.append(first_line(errors[0]))
            continue
        if difference <= _TOLERANCE[precision]:
            return launch
        problems.append(f"results differ by {difference:.2g}")
    if problems:
        found = "; ".join(dict.fromkeys(problems))
        warnings.warn(
            f"the Triton kernels of the contrastive losses do not work on {device} ({found}): "
            "PyTorch operations are used instead, which are slower",
            stacklevel=2,
        )
    return None


def _difference(device: torch.device, width: int, launch: Launch) -> float:
    """Measure the largest difference from the plain formula in float64, for both kernels, in a pool and between two
    views."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1).mul(1.5).to(device)
        for n in (300, 170)
    )
    weights = [torch.rand(n, generator=generator).to(device) for n in (300, 170)]
    alone, worst = Share(), 0.0
    for pool, other, other_weight in ((True, x, weights[0]), (False, y, weights[1])):
        exponentials = (x.double() @ other.double().T).exp()
        if pool:
            exponentials.fill_diagonal_(0)
        sums = row_sums(x, other, launch, alone, pool).double()
        worst = max(worst, float((sums.log() - exponentials.sum(1).log()).abs().max()))
        expected = (exponentials * (weights[0].double()[:, None] + other_weight.double())) @ other.double()
        found = gradient(x, other, weights[0], other_weight, launch, alone, pool).double()
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst if math.isfinite(worst) else math.inf
