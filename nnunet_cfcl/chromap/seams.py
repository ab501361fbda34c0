"""Visibility of the borders of the sliding windows in a map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seam_contrast(coordinates: Tensor, borders: Sequence[Sequence[int]]) -> float | None:
    """Mean step of the coordinates across borders of windows, relative to the mean step elsewhere along the same axes.

    Args:
        coordinates: (2, *S).
        borders: for every axis the voxels that are the first behind a border; 0 and the axis' end are no borders.

    Returns:
        1 where borders do not differ from other places, 2 where their steps are twice as large; None without borders,
        or where all coordinates are alike.
    """
    at_borders, elsewhere = [], []
    for axis, places in enumerate(borders, start=1):
        length = coordinates.shape[axis]
        inside = [place - 1 for place in sorted(set(places)) if 0 < place < length]
        if inside:
            steps = _steps(coordinates, axis)
            chosen = torch.zeros(length - 1, dtype=torch.bool)
            chosen[inside] = True
            at_borders.append(steps[chosen])
            elsewhere.append(steps[~chosen])
    if not at_borders or not torch.cat(elsewhere).numel():
        return None
    usual = float(torch.cat(elsewhere).mean())
    return float(torch.cat(at_borders).mean()) / usual if usual > 0 else None


def _steps(coordinates: Tensor, axis: int) -> Tensor:
    """Mean distance from every slice along an axis to the next one; slice by slice, to need no second map."""
    slices = coordinates.movedim(axis, 0)
    return torch.stack([torch.linalg.vector_norm(after.float() - before.float(), dim=0).mean().cpu()
                        for before, after in zip(slices, slices[1:])])
