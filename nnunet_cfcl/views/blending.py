"""Overlapping windows over an image: where they lie, how much each counts in a voxel, sums of the planes that windows
still add to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AxisWindows(NamedTuple):
    """Windows along one axis of an image.

    Attributes:
        starts: (M,) first voxel of each, ascending, no gap between them; negative where one reaches beyond the image.
        shares: (M, size) float32, how much a window counts in each of its voxels; the shares of all windows that cover
            a voxel sum to 1. In the image a window counts with the product over the axes.
    """

    starts: tuple[int, ...]
    shares: Tensor


#: The windows along every axis of an image of a spatial shape; the image is covered by all their combinations.
Windows = Callable[[Sequence[int]], list[AxisWindows]]


def outer_shares(shares: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The weights (N, 1, *S) of N windows, from their shares (size,) along every axis."""
    axes = [torch.stack(axis).to(device) for axis in zip(*shares, strict=True)]
    weight = torch.ones(1, 1, *[1] * len(axes), device=device)
    for number, axis in enumerate(axes):
        weight = weight * axis.view(len(axis), 1, *[-1 if other == number else 1 for other in range(len(axes))])
    return weight


def forget_planes(sums: Tensor, dim: int, count: int) -> None:
    """Drops the first ``count`` planes along an axis, in place: those behind them move up, zeros follow."""
    planes = sums.movedim(dim, 0)
    kept = len(planes) - count
    # plane by plane: source and destination overlap, and a copy would need the memory again
    for plane in range(kept):
        planes[plane] = planes[plane + count]
    planes[kept:] = 0
