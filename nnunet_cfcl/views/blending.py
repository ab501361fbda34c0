"""Overlapping sliding windows over an image: positions, blending weights, and the buffer of unfinished planes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AxisWindows(NamedTuple):
    """Windows along one axis of an image.

    Attributes:
        starts: (M,) first voxel of each window, ascending, without gaps; negative where a window reaches beyond the
            image.
        shares: (M, size) float32 blending weights of a window in each of its voxels; the weights of all windows that
            cover a voxel sum to 1. The weight in the image is the product over the axes.
    """

    starts: tuple[int, ...]
    shares: Tensor


#: Spatial shape of an image -> windows along every axis; all their combinations cover the image.
Windows = Callable[[Sequence[int]], list[AxisWindows]]


def outer_shares(shares: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Compute the weights (N, 1, *S) of N windows from their shares (size,) along every axis."""
    axes = [torch.stack(axis).to(device) for axis in zip(*shares, strict=True)]
    weight = torch.ones(1, 1, *[1] * len(axes), device=device)
    for number, axis in enumerate(axes):
        weight = weight * axis.view(len(axis), 1, *[-1 if other == number else 1 for other in range(len(axes))])
    return weight


def forget_planes(sums: Tensor, dim: int, count: int) -> None:
    """Drop the first ``count`` planes along an axis, in place; the others move to the front, followed by zeros."""
    planes = sums.movedim(dim, 0)
    kept = len(planes) - count
    # plane by plane: source and destination overlap, and a copy would double the memory
    for plane in range(kept):
        planes[plane] = planes[plane + count]
    planes[kept:] = 0
