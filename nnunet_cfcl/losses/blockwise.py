"""Log-sum-exp of a matrix product along both axes, block by block, in memory linear in the number of points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Largest bound on the logits for which blocks are computed in float32, and in float64. Without a running maximum,
#: exp(bound) * N has to stay finite and g * exp(-bound) / N normal, g being the incoming gradient (about 1 / N).
FLOAT32_BOUND = 55.0
FLOAT64_BOUND = 500.0

# 64 MiB in float32. Smaller blocks would stay in a CPU's cache, which gains a tenth at best. But every operation on a
# block is a meeting of all threads (on a GPU, a launch): where other processes want the cores too, such as those that
# load the data, many small blocks take several times longer.
_BLOCK_SIDE = 4096

_LOG2_E = 1 / math.log(2)


def two_way_log_sum_exp(x: Tensor, y: Tensor, bound: float, block_side: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Row and column log-sum-exp of the logits :math:`S = x y^T` without ever holding S.

    .. math:: r_i = \log \sum_j \exp S_{ij}, \qquad c_j = \log \sum_i \exp S_{ij}

    S is visited in square blocks. Each block costs one matrix product and one exponential for both directions. The
    backward pass computes the blocks again, so that memory is linear in N + M. With g and h the gradients of r and c,

    .. math:: G_{ij} = \exp(S_{ij}) \, (g_i e^{-r_i} + h_j e^{-c_j}), \qquad dx = G y, \qquad dy = G^T x

    There is no running maximum: the caller knows a bound on the logits (embeddings of unit length divided by the
    temperature tau are bounded by 1 / tau), and below it every exponential is finite and normal. Bounds up to
    ``FLOAT32_BOUND`` are computed in float32, larger ones (tau below 0.018) in float64, which not every device has.
    This holds for N, M up to 250,000. Half precision is computed in float32, whatever autocast says.

    Args:
        x: (N, d) rows, any floating type.
        y: (M, d) columns, same type and device.
        bound: the caller's promise that ``|S_ij| <= bound``; in (0, ``FLOAT64_BOUND``].
        block_side: side of a block in points, 4096 by default; two blocks are held. It does not change the result.

    Returns:
        row log-sum-exp (N,) and column log-sum-exp (M,), float32, or float64 if x is. A sum over nothing is -inf.

    Raises:
        ValueError: shapes, types or devices do not fit, or bound or block_side is out of range.
        RuntimeError: a second derivative is asked for (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import two_way_log_sum_exp
        >>> x, y = torch.eye(3), torch.eye(3)
        >>> rows, columns = two_way_log_sum_exp(x, y, bound=1.0)
        >>> torch.allclose(rows, torch.logsumexp(x @ y.T, dim=1))
        True
    """
    _check(x, y, bound, block_side)
    result = torch.promote_types(x.dtype, torch.float32)
    compute = result if bound <= FLOAT32_BOUND else torch.float64
    rows, columns = _TwoWayLogSumExp.apply(x.to(compute), y.to(compute), block_side or _BLOCK_SIDE)
    return rows.to(result), columns.to(result)


class _TwoWayLogSumExp(torch.autograd.Function):
    """Forward and backward of :func:`two_way_log_sum_exp`; x and y come in the type of the computation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Visit every block once; rows and columns gather its sums."""
        rows, columns = x.new_zeros(len(x)), y.new_zeros(len(y))
        with torch.autocast(x.device.type, enabled=False):
            for i, j, exponential, _ in _exponential_blocks(x, y, side):
                rows[i] += exponential.sum(dim=1)
                columns[j] += exponential.sum(dim=0)
        rows.log_()
        columns.log_()
        ctx.save_for_backward(x, y, rows, columns)
        ctx.side = side
        return rows, columns

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Visit every block again and turn it in place into the gradient of the logits."""
        # once_differentiable would stay silent here: a loss that is a plain mean sends gradients without a graph.
        if torch.is_grad_enabled():
            raise RuntimeError("the blockwise log-sum-exp has no second derivative: do not use create_graph=True")
        x, y, rows, columns = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dy = torch.zeros_like(y) if ctx.needs_input_grad[1] else None
        row_weight = (grad_rows * torch.exp(-rows))[:, None]
        column_weight = (grad_columns * torch.exp(-columns))[None, :]
        with torch.autocast(x.device.type, enabled=False):
            for i, j, grad, scratch in _exponential_blocks(x, y, ctx.side):
                grad.mul_(torch.add(row_weight[i], column_weight[:, j], out=scratch))
                if dx is not None:
                    dx[i].addmm_(grad, y[j])
                if dy is not None:
                    dy[j].addmm_(grad.T, x[i])
        return dx, dy, None


def _exponential_blocks(x: Tensor, y: Tensor, side: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield row slice, column slice, exp(x y^T) there and a scratch block of that shape; both are overwritten later."""
    # exp2 takes little more than half the time of exp on a CPU, for one scaling of x.
    x = x * _LOG2_E
    size = min(side, len(x)) * min(side, len(y))
    buffer, spare = x.new_empty(size), x.new_empty(size)
    for top in range(0, len(x), side):
        i = slice(top, min(top + side, len(x)))
        for left in range(0, len(y), side):
            j = slice(left, min(left + side, len(y)))
            shape = (i.stop - i.start, j.stop - j.start)
            block = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(x[i], y[j].T, out=block).exp2_()
            yield i, j, block, spare[: block.numel()].view(shape)


def _check(x: Tensor, y: Tensor, bound: float, block_side: int | None) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be (N, d) and (M, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or not x.is_floating_point() or x.device != y.device:
        raise ValueError(
            f"x and y must share a floating type and a device, got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
    if not 0 < bound <= FLOAT64_BOUND:
        raise ValueError(f"bound must lie in (0, {FLOAT64_BOUND:g}], got {bound}")
    if block_side is not None and block_side < 1:
        raise ValueError(f"block_side must be at least 1, got {block_side}")
