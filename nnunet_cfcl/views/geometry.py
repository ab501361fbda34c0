"""Affine views in which every pixel has a known position in the patient.

Two coordinate systems, both in array-axis order ([z,] y, x):

- *canonical*: millimetres relative to the centre of the crop all views of an image are cut from;
- *normalised view coordinates* u in [-1, 1]^D: pixel k of n has its centre at (2 k + 1) / n - 1
  (``align_corners=False``).

A view is a matrix M of shape (D, D + 1) with canonical x = M[:, :D] u + M[:, D]. Method section 2: rotation and
random resized crop (Lafargue-Hauret et al., arXiv 2603.17110), here in millimetres and in 2D and 3D.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.errors import UserError

ANISOTROPY_THRESHOLD = 3
"""Axes that differ by more than this factor do not rotate into each other (nnU-Net's ANISO_THRESHOLD)."""

MINIMAL_VOXELS, MINIMAL_SLICES = 4, 2
"""Source voxels that the smallest view must cover, along rotating axes and along the others (thick slices)."""

CANDIDATES, ASPECT_ATTEMPTS, PROBES = 16, 8, 256
"""Candidate views from which one that overlaps view 0 is chosen, aspect ratios drawn per view, points per overlap."""

POINTS_AT_ONCE = 1 << 24
"""Sampling positions held in memory at a time when views are cut."""


@dataclass(frozen=True)
class ViewGeometry:
    """Shape of the network's input and its spacing.

    Args:
        patch_size: voxels per axis, [z,] y, x.
        spacing: voxel size in millimetres per axis, same order.

    Raises:
        UserError: the axes are not 2 or 3, their numbers differ, or a value is not positive and finite.
    """

    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.patch_size) not in (2, 3) or len(self.patch_size) != len(self.spacing):
            raise UserError(
                f"views need a patch size and a spacing of 2 or 3 axes each, found patch {list(self.patch_size)} and "
                f"spacing {list(self.spacing)}", "check the plan's configuration")
        if not all(0 < value < math.inf for value in (*self.patch_size, *self.spacing)):
            raise UserError(
                f"patch size and spacing must be positive, found patch {list(self.patch_size)} and spacing "
                f"{list(self.spacing)}", "check the plan's configuration")

    @property
    def dimensions(self) -> int:
        """Number of spatial axes D, 2 or 3."""
        return len(self.patch_size)

    @property
    def extent(self) -> tuple[float, ...]:
        """Size of the patch in millimetres per axis."""
        return tuple(n * h for n, h in zip(self.patch_size, self.spacing))

    @property
    def rotation_planes(self) -> tuple[tuple[int, int], ...]:
        """Pairs of axes that may rotate into each other.

        2D: the one plane. 3D: all planes, but only the plane of the slices where nnU-Net would augment in 2D (the
        largest patch axis is more than 3 times the first), and none whose two spacings differ by more than 3 times.
        """
        axes = range(self.dimensions)
        if self.dimensions == 2:
            return ((0, 1),)
        if max(self.patch_size) / self.patch_size[0] > ANISOTROPY_THRESHOLD:
            axes = range(1, 3)
        return tuple(
            (i, j) for i, j in itertools.combinations(axes, 2)
            if max(self.spacing[i], self.spacing[j]) <= ANISOTROPY_THRESHOLD * min(self.spacing[i], self.spacing[j]))


@functools.lru_cache(maxsize=64)
def crop_size(geometry: ViewGeometry, settings: ViewSettings) -> tuple[int, ...]:
    """Compute the voxels per axis of the smallest crop that contains every view that can be drawn.

    Every position that a view reads lies between the centres of the crop's outermost voxels, so no padding is read.
    Equals the patch size without rotation. The largest reach is searched on a grid of angles; the error of the grid is
    bounded by the curvature (at most |e| per angle) and added.
    """
    # no view reads beyond the centres of the patch's outermost voxels (see draw_affine_views)
    reach = [(n - 1) * h for n, h in zip(geometry.patch_size, geometry.spacing)]
    planes = geometry.rotation_planes
    if settings.rotation_deg == 0 or not planes:
        return tuple(geometry.patch_size)
    limit = math.radians(settings.rotation_deg)
    grid = torch.linspace(-limit, limit, 41, dtype=torch.float64)
    rotations = _rotation(torch.cartesian_prod(*[grid] * len(planes)).reshape(-1, len(planes)), geometry)
    largest = (rotations.abs() @ torch.tensor(reach, dtype=torch.float64)).amax(0)
    missed = math.hypot(*reach) * (len(planes) * float(grid[1] - grid[0]) / 2) ** 2 / 2
    rotating = {axis for plane in planes for axis in plane}
    return tuple(
        math.ceil((float(largest[axis]) + missed) / h) + 1 if axis in rotating else n
        for axis, (n, h) in enumerate(zip(geometry.patch_size, geometry.spacing)))


def check_patch(geometry: ViewGeometry, settings: ViewSettings) -> None:
    """Reject a patch whose smallest view would be a few voxels enlarged to the full patch.

    The smallest view (at aspect 1) covers ``crop_fraction[0] ** (1 / D)`` of each axis. It must hold 4 voxels along
    axes that rotate. Along thick slices, the axes that do not rotate, 2 slices are enough: plans have few slices there
    (14 or 20 is usual) and nnU-Net treats them almost as separate images.

    Raises:
        UserError: the smallest view covers too few voxels.
    """
    rotating = {axis for plane in geometry.rotation_planes for axis in plane}
    needed = [MINIMAL_VOXELS if axis in rotating else MINIMAL_SLICES for axis in range(geometry.dimensions)]
    share = settings.crop_fraction[0] ** (1 / geometry.dimensions)
    short = [axis for axis, n in enumerate(geometry.patch_size) if n * share < needed[axis] - 1e-9]
    if not short:
        return
    covered = [round(n * share, 1) for n in geometry.patch_size]
    lowest = max(needed[axis] / geometry.patch_size[axis] for axis in short) ** geometry.dimensions
    advice = (f"raise the lower end of views.crop_fraction to at least {math.ceil(lowest * 1000) / 1000:g}"
              if lowest <= 1 else "plan the configuration with a larger patch")
    raise UserError(
        f"the patch {list(geometry.patch_size)} is too small for the views: with views.crop_fraction "
        f"{list(settings.crop_fraction)} the smallest view covers {covered} voxels, at least {needed} are needed",
        advice)


def draw_affine_views(
    generator: torch.Generator, geometry: ViewGeometry, settings: ViewSettings, n_views: int,
) -> Tensor:
    """Draw the matrices of the views of one image (method section 2).

    Each view is a random resized crop of the patch (its area or volume is uniform in ``crop_fraction`` of the patch's,
    the ratio between any two axes, relative to the patch, log-uniform in ``aspect_ratio``, its place uniform in the
    patch), then rotated about the crop's centre by a uniform angle in every plane of ``geometry.rotation_planes``.
    Views 1, 2, ... overlap view 0 by ``min_overlap`` of the smaller of the two: the first of 16 candidates that does
    is taken, then the first that does after moving its centre onto view 0's as far as the patch allows, then the one
    that overlaps most.

    Args:
        generator: CPU generator; the numbers consumed depend on ``n_views`` and D alone.

    Returns:
        (V, D, D + 1) float32, normalised view coordinates to canonical millimetres.
    """
    boxes = _draw_boxes(generator, geometry, settings, (n_views, CANDIDATES))
    first = boxes.select((slice(0, 1), slice(0, 1)))
    drawn = boxes.select((slice(1, None),))
    candidates = drawn.matrices()
    share = overlap_share(first.matrices(), candidates)
    if bool((share < settings.min_overlap).all(-1).any()):
        candidates = torch.cat([candidates, drawn.moved_towards(first).matrices()], dim=1)
        share = overlap_share(first.matrices(), candidates)
    enough = share >= settings.min_overlap
    chosen = torch.where(enough.any(-1), enough.int().argmax(-1), share.argmax(-1))
    others = candidates[torch.arange(n_views - 1), chosen]
    return torch.cat([first.matrices()[0], others]).float()


def overlap_share(a: Tensor, b: Tensor) -> Tensor:
    """Measure the share of the smaller of two views inside the other, at 256 evenly spread points.

    Args:
        a, b: (..., D, D + 1) matrices, broadcast against each other.

    Returns:
        (...) float64 in [0, 1].
    """
    a, b = torch.broadcast_tensors(a.double(), b.double())
    dimensions = a.shape[-2]
    a_is_smaller = (a[..., :dimensions].det().abs() <= b[..., :dimensions].det().abs())[..., None, None]
    small, large = torch.where(a_is_smaller, a, b), torch.where(a_is_smaller, b, a)
    offset = small[..., dimensions:] - large[..., dimensions:]
    # the smaller view in the larger one's coordinates
    relative = torch.linalg.solve(large[..., :dimensions], torch.cat([small[..., :dimensions], offset], dim=-1))
    return (to_canonical(_probes(dimensions), relative).abs() <= 1).all(-1).double().mean(-1)


def apply_affine_views(crops: Tensor, matrices: Tensor, geometry: ViewGeometry) -> Tensor:
    """Cut views out of crops by (tri)linear interpolation.

    Views only zoom in (no axis of a view is longer than the patch's), so no anti-aliasing is needed. Coordinates are
    float32 even under autocast, and never pass a matrix product that could run in TF32: that would move points by a
    visible share of a pixel.

    Args:
        crops: (N, C, *crop) images; float64 is kept, everything else is interpolated in float32.
        matrices: (N, D, D + 1) views, one per image.
        geometry: patch size and spacing of crop and view.

    Returns:
        (N, C, *patch), dtype of ``crops``; 0 outside the crop (which drawn views never reach).
    """
    return cut_views(crops, matrices, geometry, "bilinear")


def cut_views(crops: Tensor, matrices: Tensor, geometry: ViewGeometry, mode: Literal["bilinear", "nearest"]) -> Tensor:
    """Cut views (N, C, *patch) out of crops (N, C, *crop), a bounded number of sampling positions at a time."""
    _check_views(crops, matrices, geometry)
    dtype = torch.float64 if crops.dtype == torch.float64 else torch.float32
    crop_extent = torch.tensor([n * h for n, h in zip(crops.shape[2:], geometry.spacing)], dtype=torch.float64)
    scaled = (matrices.double() * (2 / crop_extent.to(matrices.device))[:, None]).to(crops.device, dtype)
    at_once = max(1, POINTS_AT_ONCE // math.prod(geometry.patch_size))
    with torch.autocast(crops.device.type, enabled=False):
        views = [
            F.grid_sample(part.to(dtype), _sampling_grid(matrix, geometry.patch_size), mode=mode,
                          padding_mode="zeros", align_corners=False).to(crops.dtype)
            for part, matrix in zip(crops.split(at_once), scaled.split(at_once))]
    return torch.cat(views)


def to_canonical(coordinates: Tensor, matrices: Tensor) -> Tensor:
    """Map normalised view coordinates to canonical millimetres.

    Args:
        coordinates: (..., P, D) in array-axis order.
        matrices: (..., D, D + 1).

    Returns:
        (..., P, D), dtype of ``coordinates``; computed in float64.
    """
    matrices = matrices.double()
    moved = coordinates.double() @ matrices[..., :-1].mT + matrices[..., -1].unsqueeze(-2)
    return moved.to(coordinates.dtype)


def to_view(points: Tensor, matrices: Tensor) -> Tensor:
    """Map canonical points to normalised view coordinates; the inverse of ``to_canonical``.

    Args:
        points: (..., P, D) millimetres.
        matrices: (..., D, D + 1).

    Returns:
        (..., P, D), dtype of ``points``; computed in float64; inside the view where all are within [-1, 1].
    """
    matrices = matrices.double()
    # inv_ex: no error check, which would synchronise a GPU
    inverse = torch.linalg.inv_ex(matrices[..., :-1]).inverse
    return ((points.double() - matrices[..., -1].unsqueeze(-2)) @ inverse.mT).to(points.dtype)


@dataclass(frozen=True)
class _Boxes:
    """Boxes inside the patch, rotated about the crop's centre; all in millimetres, float64."""

    rotation: Tensor
    """(..., D, D)"""
    half: Tensor
    """(..., D) half the box's sides"""
    centre: Tensor
    """(..., D) before rotation"""
    room: Tensor
    """(..., D) largest distance of the centre from the patch's centre"""

    def matrices(self) -> Tensor:
        centre = self.rotation @ self.centre.unsqueeze(-1)
        return torch.cat([self.rotation * self.half.unsqueeze(-2), centre], dim=-1)

    def select(self, index: tuple[slice, ...]) -> _Boxes:
        return _Boxes(self.rotation[index], self.half[index], self.centre[index], self.room[index])

    def moved_towards(self, target: _Boxes) -> _Boxes:
        """Move the centres onto the target's, or as near as the boxes stay inside the patch."""
        goal = self.rotation.mT @ (target.rotation @ target.centre.unsqueeze(-1))
        return _Boxes(self.rotation, self.half, goal.squeeze(-1).clamp(-self.room, self.room), self.room)


def _draw_boxes(
    generator: torch.Generator, geometry: ViewGeometry, settings: ViewSettings, shape: tuple[int, ...],
) -> _Boxes:
    planes = len(geometry.rotation_planes)
    angles = math.radians(settings.rotation_deg) * _uniform(generator, (*shape, planes), -1, 1)
    fractions = _draw_axis_fractions(generator, settings, shape, geometry.dimensions)
    extent = torch.tensor(geometry.extent, dtype=torch.float64)
    # less than the room to the patch's edge, so that the view's outermost pixel centres stay within the patch's
    room = (1 - fractions) * (extent - torch.tensor(geometry.spacing, dtype=torch.float64)) / 2
    centre = room * _uniform(generator, (*shape, geometry.dimensions), -1, 1)
    return _Boxes(_rotation(angles, geometry), fractions * extent / 2, centre, room)


def _draw_axis_fractions(
    generator: torch.Generator, settings: ViewSettings, shape: tuple[int, ...], dimensions: int,
) -> Tensor:
    """Draw the length of the view per axis as a share of the patch, (*shape, D) in (0, 1]; the product is the fraction.

    Aspects are redrawn until no axis exceeds the patch. If all attempts fail (a view almost as large as the patch), the
    first one is scaled towards 1 until it fits, so that the fraction itself stays uniform.
    """
    log_mean = _uniform(generator, (*shape, 1), *settings.crop_fraction).log() / dimensions
    low, high = (math.log(ratio) for ratio in settings.aspect_ratio)
    to_last = _uniform(generator, (*shape, ASPECT_ATTEMPTS, dimensions - 1), low, high)
    logs = F.pad(to_last, (0, 1))
    logs = logs - logs.mean(-1, keepdim=True)
    i, j = torch.triu_indices(dimensions, dimensions, offset=1)
    ratios = logs[..., i] - logs[..., j]
    fits = ((ratios >= low - 1e-9) & (ratios <= high + 1e-9)).all(-1) & (logs.amax(-1) <= -log_mean)
    chosen = fits.int().argmax(-1)[..., None, None].expand(*shape, 1, dimensions)
    aspect = logs.gather(-2, chosen).squeeze(-2)
    largest = aspect.amax(-1, keepdim=True)
    return (log_mean + aspect * torch.where(largest > -log_mean, -log_mean / largest, 1.0)).exp()


def _uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _rotation(angles: Tensor, geometry: ViewGeometry) -> Tensor:
    """Multiply the rotations (..., D, D) by ``angles`` (..., planes), in radians, in the geometry's planes."""
    rotation = torch.eye(geometry.dimensions, dtype=angles.dtype).expand(*angles.shape[:-1], -1, -1)
    for angle, (i, j) in zip(angles.unbind(-1), geometry.rotation_planes):
        cosine, sine = angle.cos(), angle.sin()
        turn = torch.eye(geometry.dimensions, dtype=angles.dtype).repeat(*angles.shape[:-1], 1, 1)
        turn[..., i, i] = turn[..., j, j] = cosine
        turn[..., i, j], turn[..., j, i] = -sine, sine
        rotation = rotation @ turn
    return rotation


@functools.cache
def _probes(dimensions: int) -> Tensor:
    """Compute 256 evenly spread points (256, D) in [-1, 1]^D: additive recurrence with the generalised golden ratio."""
    ratio = {1: 1.618033988749895, 2: 1.324717957244746, 3: 1.2207440846057596}[dimensions]
    steps = torch.tensor([ratio ** -(axis + 1) for axis in range(dimensions)], dtype=torch.float64)
    return (0.5 + torch.arange(PROBES, dtype=torch.float64)[:, None] * steps) % 1 * 2 - 1


def _check_views(crops: Tensor, matrices: Tensor, geometry: ViewGeometry) -> None:
    d = geometry.dimensions
    if crops.ndim != d + 2 or tuple(matrices.shape) != (crops.shape[0], d, d + 1):
        raise ValueError(f"expected crops (N, C, then {d} axes) and matrices (N, {d}, {d + 1}), "
                         f"found {tuple(crops.shape)} and {tuple(matrices.shape)}")


def _sampling_grid(matrices: Tensor, size: Sequence[int]) -> Tensor:
    """Map all pixel centres by matrices (N, D, D + 1) to positions (N, *size, D) for ``grid_sample``, x first."""
    d = len(size)
    axes = [(2 * torch.arange(n, device=matrices.device, dtype=matrices.dtype) + 1) / n - 1 for n in size]
    shaped = [axis.reshape([-1 if k == other else 1 for other in range(d)]) for k, axis in enumerate(axes)]
    rows = []
    for row in reversed(range(d)):
        entries = [matrices[:, row, k].reshape(-1, *[1] * d) for k in range(d + 1)]
        rows.append(sum((entries[k] * shaped[k] for k in range(d)), start=entries[d]))
    return torch.stack([row.expand(-1, *size) for row in rows], dim=-1)
