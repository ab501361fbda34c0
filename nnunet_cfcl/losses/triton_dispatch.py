"""Whether and how the Triton kernels do the work of `blockwise` on this GPU.

They are used for float32 on NVIDIA GPUs where Triton is there (PyTorch for Linux brings it) and no pairs are excluded,
after they have agreed with the plain formula on a small problem, once per GPU, width and precision. If they do not, one
warning is given and the blocks of `blockwise` are used. Products follow ``torch.set_float32_matmul_precision``, as
PyTorch's own do: "high" and "medium" take TF32 (three decimal digits per product, sums in float32). "highest", the
default, takes three TF32 products for one, which is as exact as float32, on Hopper; other GPUs have too few registers
for that and visit the blocks.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from nnunet_cfcl.losses.ranks import Share
from nnunet_cfcl.losses.triton_launch import Launch, Precision, candidate_tiles

#: Wider embeddings do not fit into a multiprocessor beside a second tile.
MAX_WIDTH = 256

_LOG2_E = 1 / math.log(2)

# Largest difference of log-sums, and of gradients relative to the largest, that rounding explains.
_TOLERANCE = {"tf32": 3e-3, "tf32x3": 5e-5}


def launch_for(x: Tensor, share: Share) -> Launch | None:
    """How the kernels are launched for points like x (N, d); None: they do not do this. The same on all processes."""
    if not _supported(x):
        return None
    exact = torch.get_float32_matmul_precision() == "highest"
    return _agreed_launch(x.device, x.shape[1], "tf32x3" if exact else "tf32", share)


def row_sums(x: Tensor, y: Tensor, launch: Launch, share: Share, pool: bool = False) -> Tensor:
    """(N,) sums over j of exp(x_i . y_j), without j = i in a pool; zeros in rows of other processes."""
    out = x.new_zeros(len(x))
    _kernels().write_row_sums((x * _LOG2_E).contiguous(), y.contiguous(), out, launch, share, pool)
    return out


def gradient(
    x: Tensor, y: Tensor, row_weight: Tensor, column_weight: Tensor, launch: Launch, share: Share, pool: bool = False
) -> Tensor:
    """(N, d) sums over j of exp(x_i . y_j) (row_weight_i + column_weight_j) y_j; zeros in rows of other processes."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    _kernels().write_gradient(
        (x * _LOG2_E).contiguous(), y.contiguous(), row_weight, column_weight, out, launch, share, pool
    )
    return out


def _supported(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and x.dtype == torch.float32 and 0 < x.shape[1] <= MAX_WIDTH


def _kernels() -> ModuleType:
    from nnunet_cfcl.losses import triton_kernels  # Triton takes a second to import, and not every PyTorch has it

    return triton_kernels


@cache
def _agreed_launch(device: torch.device, width: int, precision: Precision, share: Share) -> Launch | None:
    """Processes that share tiles must cut them alike: if their GPUs differ, none of them uses the kernels."""
    launch = _working_launch(device, width, precision)
    tile = launch.rows * launch.columns if launch else 0
    return launch if share.all_have(tile, device) else None


@cache
def _working_launch(device: torch.device, width: int, precision: Precision) -> Launch | None:
    """The first launch that gives the right numbers."""
    try:
        _kernels()
    except ImportError:
        return None
    problems = []
    for tile in candidate_tiles(device, precision):
        launch = Launch(*tile, precision=precision)
        try:
            difference = _difference(device, width, launch)
        except Exception as error:  # whatever a compiler or a driver may say
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        if difference <= _TOLERANCE[precision]:
            return launch
        problems.append(f"results differ by {difference:.2g}")
    if problems:
        found = "; ".join(dict.fromkeys(problems))
        warnings.warn(
            f"the Triton kernels of the contrastive losses do not work on {device} ({found}): "
            "PyTorch's own operations are used, which are right but slower",
            stacklevel=2,
        )
    return None


def _difference(device: torch.device, width: int, launch: Launch) -> float:
    """Largest difference from the plain formula in float64, for both kernels, in a pool and between two sides."""
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
