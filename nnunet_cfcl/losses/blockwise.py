"""Log-sum-exp of all pairs of points, block by block, in memory linear in the number of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nnunet_cfcl.losses import triton_dispatch
from nnunet_cfcl.losses.ranks import Share, current_share
from nnunet_cfcl.losses.triton_launch import Launch

#: (row slice, column slice) -> bool mask of the pairs to exclude from the block; None: none. Called both forward and
#: backward, with equal results.
Exclude: TypeAlias = Callable[[slice, slice], Tensor | None]

#: Rows and columns of a block of pairs.
Block: TypeAlias = tuple[slice, slice]

#: Largest bound on the logits for which blocks are computed in float32, and in float64. Without a running maximum,
#: exp(bound) * N has to stay finite and g * exp(-bound) / N normal, g being the incoming gradient (about 1 / N).
FLOAT32_BOUND = 55.0
FLOAT64_BOUND = 500.0

# 64 MiB in float32. Smaller blocks would stay in a CPU's cache, which gains 10 % at best. But every operation on a
# block synchronises all threads (on a GPU, launches a kernel): where data loading processes compete for the cores,
# many small blocks take several times longer.
_BLOCK_SIDE = 4096

# Least number of blocks per process, about, so that all have nearly the same work.
_BLOCKS_PER_PROCESS = 8

_LOG2_E = 1 / math.log(2)


def two_way_log_sum_exp(
    x: Tensor, y: Tensor, bound: float, block_side: int | None = None, exclude: Exclude | None = None
) -> tuple[Tensor, Tensor]:
    r"""Compute row and column log-sum-exp of the logits :math:`S = x y^T` without holding S in memory.

    .. math:: r_i = \log \sum_j \exp S_{ij}, \qquad c_j = \log \sum_i \exp S_{ij}

    S is visited in square blocks. Each block costs one matrix product and one exponential for both directions. The
    backward pass computes the blocks again, so that memory is linear in N + M. With g and h the gradients of r and c,

    .. math:: G_{ij} = \exp(S_{ij}) \, (g_i e^{-r_i} + h_j e^{-c_j}), \qquad dx = G y, \qquad dy = G^T x

    No running maximum is needed: the caller gives a bound on the logits (1 / tau for unit embeddings divided by the
    temperature tau), below which every exponential is finite and normal. Bounds up to
    ``FLOAT32_BOUND`` are computed in float32, larger ones (tau below 0.018) in float64, which not every device has.
    This holds for N, M up to 250,000. Half precision is computed in float32, also under autocast.

    Within `share_blocks` each process visits its part of the blocks. On CUDA, without ``exclude``, Triton kernels take
    over where they can (see :mod:`~nnunet_cfcl.losses.triton_dispatch`).

    Args:
        x: (N, d) rows, any floating type.
        y: (M, d) columns, same type and device.
        bound: upper bound of ``|S_ij|``, in (0, ``FLOAT64_BOUND``]; the caller guarantees it.
        block_side: side of a block in points, 4096 by default; two blocks are held. It does not change the result.
        exclude: pairs to leave out, in both directions; None: none.

    Returns:
        row log-sum-exp (N,) and column log-sum-exp (M,), float32, or float64 if x is. An empty sum is -inf, with zero
        gradients.

    Raises:
        ValueError: shapes, types or devices do not fit, or bound or block_side is out of range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import two_way_log_sum_exp
        >>> x, y = torch.eye(3), torch.eye(3)
        >>> rows, columns = two_way_log_sum_exp(x, y, bound=1.0)
        >>> torch.allclose(rows, torch.logsumexp(x @ y.T, dim=1))
        True
    """
    _check(x, y, bound, block_side)
    result, compute = _types(x, bound)
    share = current_share()
    side = block_side or _side(len(x) * len(y), share.count)
    work = _Work(share.mine(rectangle_blocks(len(x), len(y), side)), share, exclude)
    rows, columns = _TwoWayLogSumExp.apply(x.to(compute), y.to(compute), work)
    return rows.to(result), columns.to(result)


def pool_log_sum_exp(
    z: Tensor, bound: float, block_side: int | None = None, exclude: Exclude | None = None
) -> Tensor:
    r"""Compute the log-sum-exp of each point's logits with all others of a pool without holding :math:`S = z z^T`.

    .. math:: r_i = \log \sum_{j \ne i} \exp S_{ij}

    S is symmetric, so only blocks on and above the diagonal are visited: half a product of N x N x d forward. Backward
    takes one and a half, with g the gradient of r:

    .. math:: G_{ij} = \exp(S_{ij}) \, (g_i e^{-r_i} + g_j e^{-r_j}), \qquad dz = G z

    A temperature tau goes into the points, as unit embeddings divided by the square root of tau; it may be learned.
    Precision, processes and Triton as in `two_way_log_sum_exp`.

    Args:
        z: (N, d) points, any floating type.
        bound: upper bound of ``|S_ij|``, in (0, ``FLOAT64_BOUND``]; the caller guarantees it.
        block_side: side of a block in points, 4096 by default; two blocks are held. It does not change the result.
        exclude: pairs to leave out besides those of a point with itself; symmetric.

    Returns:
        (N,) float32, or float64 if z is. An empty sum is -inf, with zero gradients.

    Raises:
        ValueError: shape or type does not fit, or bound or block_side is out of range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import pool_log_sum_exp
        >>> pool_log_sum_exp(torch.eye(3), bound=1.0)  # log(e^0 + e^0)
        tensor([0.6931, 0.6931, 0.6931])
    """
    _check(z, z, bound, block_side)
    result, compute = _types(z, bound)
    share = current_share()
    side = block_side or _side(len(z) ** 2 // 2, share.count)
    work = _Work(share.mine(triangle_blocks(len(z), side)), share, exclude)
    rows: Tensor = _PoolLogSumExp.apply(z.to(compute), work)
    return rows.to(result)


@dataclass(frozen=True)
class _Work:
    """The blocks that this process visits, and the pairs it excludes there."""

    blocks: Sequence[Block]
    share: Share
    exclude: Exclude | None

    def launch(self, x: Tensor) -> Launch | None:
        """Select the launch of the Triton kernels, which cannot exclude pairs; None: the blocks are visited instead."""
        return None if self.exclude else triton_dispatch.launch_for(x, self.share)


class _TwoWayLogSumExp(torch.autograd.Function):
    """Forward and backward of :func:`two_way_log_sum_exp`; x and y come in the type of the computation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, work: _Work) -> tuple[Tensor, Tensor]:
        """Visit every block once; rows and columns gather its sums."""
        ctx.launch = work.launch(x)
        if ctx.launch:
            rows = triton_dispatch.row_sums(x, y, ctx.launch, work.share)
            columns = triton_dispatch.row_sums(y, x, ctx.launch, work.share)
        else:
            rows, columns = x.new_zeros(len(x)), y.new_zeros(len(y))
            with torch.autocast(x.device.type, enabled=False):
                for i, j, exponential, _ in _exponential_blocks(x, y, work):
                    rows[i] += exponential.sum(dim=1)
                    columns[j] += exponential.sum(dim=0)
        work.share.sum(rows, columns)
        rows.log_()
        columns.log_()
        ctx.save_for_backward(x, y, rows, columns)
        ctx.work = work
        return rows, columns

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Visit every block again and turn it in place into the gradient of the logits."""
        _reject_second_derivative()
        x, y, rows, columns = ctx.saved_tensors
        work: _Work = ctx.work
        wants_x, wants_y, _ = ctx.needs_input_grad
        row_weight, column_weight = _weight(grad_rows, rows), _weight(grad_columns, columns)
        if ctx.launch:
            dx = triton_dispatch.gradient(x, y, row_weight, column_weight, ctx.launch, work.share) if wants_x else None
            dy = triton_dispatch.gradient(y, x, column_weight, row_weight, ctx.launch, work.share) if wants_y else None
        else:
            dx = torch.zeros_like(x) if wants_x else None
            dy = torch.zeros_like(y) if wants_y else None
            _add_gradients(x, y, row_weight, column_weight, dx, dy, work)
        work.share.sum(dx, dy)
        return dx, dy, None


class _PoolLogSumExp(torch.autograd.Function):
    """Forward and backward of :func:`pool_log_sum_exp`; z comes in the type of the computation."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, work: _Work) -> Tensor:
        """Visit every block on and above the diagonal once; one below it is its mirror image."""
        ctx.launch = work.launch(z)
        if ctx.launch:
            rows = triton_dispatch.row_sums(z, z, ctx.launch, work.share, pool=True)
        else:
            rows = z.new_zeros(len(z))
            with torch.autocast(z.device.type, enabled=False):
                for i, j, exponential, _ in _exponential_blocks(z, z, work, pool=True):
                    rows[i] += exponential.sum(dim=1)
                    if i != j:
                        rows[j] += exponential.sum(dim=0)
        work.share.sum(rows)
        rows.log_()
        ctx.save_for_backward(z, rows)
        ctx.work = work
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, None]:
        """Visit every block again and turn it in place into the gradient of the logits."""
        _reject_second_derivative()
        z, rows = ctx.saved_tensors
        work: _Work = ctx.work
        weight = _weight(grad_rows, rows)
        if ctx.launch:
            dz = triton_dispatch.gradient(z, z, weight, weight, ctx.launch, work.share, pool=True)
        else:
            dz = torch.zeros_like(z)
            _add_gradients(z, z, weight, weight, dz, dz, work, pool=True)
        work.share.sum(dz)
        return dz, None


def _add_gradients(
    x: Tensor, y: Tensor, row_weight: Tensor, column_weight: Tensor, dx: Tensor | None, dy: Tensor | None,
    work: _Work, pool: bool = False,
) -> None:
    with torch.autocast(x.device.type, enabled=False):
        for i, j, grad, scratch in _exponential_blocks(x, y, work, pool):
            grad.mul_(torch.add(row_weight[i, None], column_weight[None, j], out=scratch))
            if dx is not None:
                dx[i].addmm_(grad, y[j])
            if dy is not None and not (pool and i == j):  # a block on the diagonal holds its mirror image
                dy[j].addmm_(grad.T, x[i])


def _exponential_blocks(
    x: Tensor, y: Tensor, work: _Work, pool: bool = False
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield row slice, column slice, exp(x y^T) there, 0 for excluded pairs, and a scratch block of that shape; both
    blocks are reused by the next iteration."""
    # exp2 takes little more than half the time of exp on a CPU, for one scaling of x.
    x = x * _LOG2_E
    size = max((_length(i) * _length(j) for i, j in work.blocks), default=0)
    buffer, spare = x.new_empty(size), x.new_empty(size)
    for i, j in work.blocks:
        shape = (_length(i), _length(j))
        block = buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(x[i], y[j].T, out=block).exp2_()
        if pool and i == j:
            block.fill_diagonal_(0)
        mask = work.exclude(i, j) if work.exclude else None
        if mask is not None:
            block.masked_fill_(mask, 0)
        yield i, j, block, spare[: block.numel()].view(shape)


def rectangle_blocks(rows: int, columns: int, side: int) -> list[Block]:
    """Divide rows x columns into blocks of at most side x side pairs."""
    return [(i, j) for i in strips(rows, side) for j in strips(columns, side)]


def triangle_blocks(points: int, side: int) -> list[Block]:
    """List the blocks of points x points on and above the diagonal. Blocks on the diagonal, which cost less backward,
    come last: processes that take every n-th block have equal work."""
    all_strips = strips(points, side)
    above = [(i, j) for top, i in enumerate(all_strips) for j in all_strips[top + 1 :]]
    return above + [(i, i) for i in all_strips]


def strips(points: int, side: int) -> list[slice]:
    """Divide the points into the fewest strips of at most ``side`` points, all of nearly the same length."""
    count = -(-points // side)
    edges = [number * points // count for number in range(count + 1)] if count else []
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


def _side(pairs: int, processes: int) -> int:
    """Choose the side of a block so that every process has several blocks."""
    if processes == 1:
        return _BLOCK_SIDE
    return max(1, min(_BLOCK_SIDE, math.isqrt(pairs // (_BLOCKS_PER_PROCESS * processes))))


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _weight(grad: Tensor, log_sum: Tensor) -> Tensor:
    """Compute g exp(-r), and 0 for an empty sum, which no point changes."""
    return (grad * torch.exp(-log_sum)).masked_fill_(log_sum.isneginf(), 0)


def _types(x: Tensor, bound: float) -> tuple[torch.dtype, torch.dtype]:
    """Return the types of the result and of the computation."""
    result = torch.promote_types(x.dtype, torch.float32)
    return result, result if bound <= FLOAT32_BOUND else torch.float64


def _reject_second_derivative() -> None:
    # once_differentiable would stay silent here: a loss that is a plain mean sends gradients without a graph.
    if torch.is_grad_enabled():
        raise RuntimeError("the blockwise log-sum-exp has no second derivative: do not use create_graph=True")


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
