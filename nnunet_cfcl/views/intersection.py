"""Tight bounding box around the intersection of oriented boxes, here views and image."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""Slack in millimetres or normalised units, relative to sizes of about 1 to 1000."""


def bounding_frame(frames: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Find the smallest box around the intersection of oriented boxes that is parallel to one of them.

    Box b holds the points x with low_b <= frames_b x <= high_b. The corners of the intersection (a convex polytope) are
    all feasible meeting points of D faces; they are enumerated, and bounded along the axes of every box in turn.

    Args:
        frames: (..., B, D, D) invertible, float64.
        low, high: (..., B, D) bounds.

    Returns:
        matrices (..., D, D + 1) that map [0, 1]^D onto the box, and empty (...) bool, True where there is no
        intersection and the matrix is 0.
    """
    boxes, dimensions = frames.shape[-3:-1]
    corners, feasible = _corners(frames.flatten(-3, -2), low.flatten(-2), high.flatten(-2))
    # (..., B, corners, D): every corner along the axes of every box
    along = corners.unsqueeze(-3) @ frames.mT
    outside = ~feasible[..., None, :, None]
    start = along.masked_fill(outside, torch.inf).amin(-2)
    size = along.masked_fill(outside, -torch.inf).amax(-2) - start
    empty = ~feasible.any(-1)
    inverse = torch.linalg.inv_ex(frames).inverse
    volume = size.prod(-1) * inverse.det().abs()
    best = volume.argmin(-1)[..., None, None, None]
    matrices = torch.cat([inverse * size.unsqueeze(-2), inverse @ start.unsqueeze(-1)], dim=-1)
    chosen = matrices.gather(-3, best.expand(*best.shape[:-2], dimensions, dimensions + 1)).squeeze(-3)
    return chosen.masked_fill(empty[..., None, None], 0.0), empty


def _corners(normals: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Find the meeting points (..., M, D) of D of the faces with normals (..., R, D), and the mask (..., M) of those
    that satisfy all constraints."""
    faces, sides = _face_choices(normals.shape[-2], normals.shape[-1])
    inverse = torch.linalg.inv_ex(normals[..., faces, :]).inverse
    bounds = torch.stack([low, high], dim=-1)[..., faces[:, None, :], sides[None, :, :]]
    points = (bounds @ inverse.mT).flatten(-3, -2)
    values = points @ normals.mT
    slack = TOLERANCE * (1 + high - low).clamp(min=1).unsqueeze(-2)
    # parallel faces have no meeting point: infinite or NaN, which no comparison accepts
    feasible = ((values >= low.unsqueeze(-2) - slack) & (values <= high.unsqueeze(-2) + slack)).all(-1)
    return points, feasible & points.isfinite().all(-1)


@functools.cache
def _face_choices(rows: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """List all choices of D of R constraints (K, D), and of their lower or upper side (2^D, D)."""
    faces = torch.tensor(list(itertools.combinations(range(rows), dimensions)))
    return faces, torch.tensor(list(itertools.product((0, 1), repeat=dimensions)))
