"""Triton kernels for sums of exponentials of all pairs, without any logit in global memory; see `triton_dispatch`.

Each program owns a tile of rows and walks over all columns, in the manner of flash attention (Dao et al. 2022,
arXiv 2205.14135), but without a running maximum: logits are bounded. No two programs write to the same address, so
results are deterministic.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_cfcl.losses.ranks import Share
from nnunet_cfcl.losses.triton_launch import Launch


def write_row_sums(x: Tensor, y: Tensor, out: Tensor, launch: Launch, share: Share, pool: bool) -> None:
    """Write out_i = sum_j 2^(x_i . y_j), without j = i in a pool, for this process's tiles of rows.

    Args:
        x: (N, d) float32, contiguous.
        y: (M, d) float32, contiguous.
        out: (N,) float32; rows of other processes stay unchanged.
    """
    _launch(_row_sums, x, y, (out,), launch, share, pool)


def write_gradient(
    x: Tensor, y: Tensor, row_weight: Tensor, column_weight: Tensor, out: Tensor, launch: Launch, share: Share,
    pool: bool,
) -> None:
    """Write out_i = sum_j 2^(x_i . y_j) (row_weight_i + column_weight_j) y_j for this process's tiles of rows.

    Args:
        x, y: as in `write_row_sums`.
        row_weight, column_weight: (N,) and (M,) float32.
        out: (N, d) float32; rows of other processes stay unchanged.
    """
    _launch(_gradient, x, y, (row_weight, column_weight, out), launch, share, pool)


def _launch(
    kernel: Any, x: Tensor, y: Tensor, tensors: tuple[Tensor, ...], launch: Launch, share: Share, pool: bool
) -> None:
    tiles = share.mine(range(triton.cdiv(len(x), launch.rows)))
    if len(tiles) == 0:
        return
    width = x.shape[1]
    with torch.cuda.device_of(x):
        kernel[(len(tiles),)](
            x, y, *tensors, len(x), len(y), width, share.rank, share.count, POOL=pool, ROWS=launch.rows,
            COLUMNS=launch.columns, WIDTH=max(16, triton.next_power_of_2(width)), PRECISION=launch.precision,
            num_warps=launch.warps, num_stages=launch.stages,
        )


@triton.jit
def _row_sums(
    x, y, out, rows, columns, width, rank, count, POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):
    i = (rank + tl.program_id(0) * count) * ROWS + tl.arange(0, ROWS)
    own = _points(x, i, rows, width, WIDTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        total += _exponentials(own, _points(y, j, columns, width, WIDTH), i, j, columns, POOL, PRECISION)
    tl.store(out + i, tl.sum(total, 1), mask=i < rows)


@triton.jit
def _gradient(
    x, y, row_weight, column_weight, out, rows, columns, width, rank, count, POOL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):
    i = (rank + tl.program_id(0) * count) * ROWS + tl.arange(0, ROWS)
    own = _points(x, i, rows, width, WIDTH)
    weight = tl.load(row_weight + i, mask=i < rows, other=0.0)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        others = _points(y, j, columns, width, WIDTH)
        weights = weight[:, None] + tl.load(column_weight + j, mask=j < columns, other=0.0)[None, :]
        logit_gradient = _exponentials(own, others, i, j, columns, POOL, PRECISION) * weights
        total += tl.dot(logit_gradient, others, input_precision=PRECISION)
    place, inside = _place(i, rows, width, WIDTH)
    tl.store(out + place, total, mask=inside)


@triton.jit
def _exponentials(own, others, i, j, columns, POOL: tl.constexpr, PRECISION: tl.constexpr):
    """Compute 2^(x y^T) of a tile, 0 for excluded pairs."""
    powers = tl.exp2(tl.dot(own, tl.trans(others), input_precision=PRECISION))
    counts = (j < columns)[None, :]
    if POOL:
        counts = counts & (i[:, None] != j[None, :])
    return tl.where(counts, powers, 0.0)


@triton.jit
def _points(z, i, points, width, WIDTH: tl.constexpr):
    """Load rows i of z (points, width), padded with zeros."""
    place, inside = _place(i, points, width, WIDTH)
    return tl.load(z + place, mask=inside, other=0.0)


@triton.jit
def _place(i, points, width, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    return i[:, None] * width + d[None, :], (i < points)[:, None] & (d < width)[None, :]
