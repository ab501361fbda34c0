"""Corresponding points of two views, and the features read there (method section 4, section 6 items 6 and 7)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_cfcl.views.geometry import ViewGeometry, to_canonical, to_view
from nnunet_cfcl.views.intersection import bounding_frame

ROUNDS = (2, 4, 8, 16)
"""Proposals per point wanted, round by round, until every pair has its points."""

TOLERANCE = 1e-5
"""Share of a voxel a read may reach over the outermost real voxel's centre: rounding of the matrices, no more."""


def tissue_box(
    valid_low: Sequence[int] | Tensor, valid_high: Sequence[int] | Tensor, crop_size: Sequence[int],
    spacing: Sequence[float],
) -> Tensor:
    """Canonical box spanned by the centres of a crop's real voxels.

    Args:
        valid_low, valid_high: (D,) voxel indices inside the crop; real image in [low, high), padding elsewhere.
        crop_size: (D,) voxels of the crop.
        spacing: (D,) millimetres.

    Returns:
        (2, D) float64 millimetres: lowest and highest voxel centre. No real voxel: low above high.
    """
    low, high, size, step = (
        torch.as_tensor(values, dtype=torch.float64) for values in (valid_low, valid_high, crop_size, spacing))
    return torch.stack([low + 0.5 - size / 2, high - 0.5 - size / 2]) * step


def draw_corresponding_points(
    generator: torch.Generator, matrices: Tensor, geometry: ViewGeometry, tissue_box: Tensor, count: int,
) -> tuple[Tensor, Tensor]:
    """Draw points that view 0 and view i both show, for i = 1 .. V - 1.

    Points are independent and uniform over all places where the (tri)linear reads in both views (2^D pixels each) use
    real image only: inside the outermost pixel centres of both views, and every pixel read inside the tissue box.
    Rejection from the smallest box around the intersection of the two views and the tissue.

    Args:
        generator: CPU generator; one number is consumed.
        matrices: (V, D, D + 1) views of one image, on the CPU.
        tissue_box: (2, D) canonical millimetres, see ``tissue_box``.
        count: points per pair P.

    Returns:
        points (V - 1, P, D) float32, canonical millimetres, and valid (V - 1, P) bool. Where fewer than P were found
        (views that share next to no tissue), the rest are finite and marked False.
    """
    # a generator of our own: as many rounds as needed, and the caller's still moves on by one number
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
    views, tissue = matrices.double(), tissue_box.double()
    pairs = torch.stack([views[:1].expand(len(views) - 1, -1, -1), views[1:]], dim=1)
    frame, empty = _intersection_frame(pairs, geometry, tissue)
    proposals, accepted = [], []
    for effort in ROUNDS:
        unit = torch.rand(len(pairs), effort * count, geometry.dimensions, generator=own, dtype=torch.float64)
        proposals.append(to_canonical(unit, frame))
        accepted.append(_reads_tissue(proposals[-1], pairs, geometry, tissue) & ~empty[:, None])
        found = sum(part.sum(-1) for part in accepted)
        if bool(((found >= count) | empty).all()):
            break
    points, good = torch.cat(proposals, dim=1), torch.cat(accepted, dim=1)
    valid, order = good.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    chosen = order[:, :count, None].expand(-1, -1, geometry.dimensions)
    return points.gather(1, chosen).float(), valid[:, :count].bool()


def _intersection_frame(pairs: Tensor, geometry: ViewGeometry, tissue: Tensor) -> tuple[Tensor, Tensor]:
    """Tight box (pairs, D, D + 1) around view 0, view i and tissue, and where they do not meet at all."""
    n_pairs, d = len(pairs), geometry.dimensions
    limit = 1 - 1 / torch.tensor(geometry.patch_size, dtype=torch.float64)
    inverse = torch.linalg.inv_ex(pairs[..., :d]).inverse
    offset = (inverse @ pairs[..., d:]).squeeze(-1)
    frames = torch.cat([inverse, torch.eye(d, dtype=torch.float64).expand(n_pairs, 1, d, d)], dim=1)
    low = torch.cat([offset - limit, tissue[0].expand(n_pairs, 1, d)], dim=1)
    high = torch.cat([offset + limit, tissue[1].expand(n_pairs, 1, d)], dim=1)
    return bounding_frame(frames, low, high)


def _reads_tissue(points: Tensor, pairs: Tensor, geometry: ViewGeometry, tissue: Tensor) -> Tensor:
    """(pairs, K) True where the reads at points (pairs, K, D) in both views of a pair use real voxels only."""
    size = torch.tensor(geometry.patch_size, dtype=torch.float64)
    coordinates = to_view(points.unsqueeze(1), pairs)
    inside = (coordinates.abs() <= 1 - 1 / size).all(-1)
    # the cell of 2^D pixel centres around the point; its canonical bounds are exact for an affine view
    cell = ((coordinates + 1) * size / 2 - 0.5).floor().clamp(min=torch.zeros_like(size), max=size - 2)
    middle = to_canonical(2 * (cell + 1) / size - 1, pairs)
    reach = (pairs[..., :-1].abs() / size).sum(-1).unsqueeze(-2)
    slack = TOLERANCE * torch.tensor(geometry.spacing, dtype=torch.float64)
    real = (middle - reach >= tissue[0] - slack) & (middle + reach <= tissue[1] + slack)
    return (inside & real.all(-1)).all(1)


def read_features(features: Tensor, coordinates: Tensor) -> Tensor:
    """Read a feature map at arbitrary points by (bi/tri)linear interpolation between pixel centres.

    The 2^D neighbours are gathered first and interpolated in float32 then, so that a half precision map is never
    copied as a whole. Beyond the outermost pixel centres the border's value continues. Differentiable in both.

    Args:
        features: (N, F, *S) of any floating type.
        coordinates: (N, K, D) normalised view coordinates, array-axis order, float32 or float64.

    Returns:
        (N, K, F) float32, or float64 where both arguments or the features are.
    """
    d = features.ndim - 2
    if coordinates.ndim != 3 or coordinates.shape[0] != features.shape[0] or coordinates.shape[2] != d:
        raise ValueError(f"expected coordinates ({features.shape[0]}, K, {d}) for features {tuple(features.shape)}, "
                         f"found {tuple(coordinates.shape)}")
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    index, weight = _neighbours(coordinates, features.shape[2:])
    count = coordinates.shape[1]
    wanted = index.flatten(1).unsqueeze(1).expand(-1, features.shape[1], -1)
    values = features.flatten(2).gather(2, wanted).unflatten(2, (2**d, count))
    return (values.to(dtype) * weight.to(dtype).unsqueeze(1)).sum(2).transpose(1, 2)


def _neighbours(coordinates: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flat indices and weights (N, 2^D, K) of the pixels around normalised coordinates (N, K, D)."""
    d = len(size)
    top = torch.tensor([n - 1 for n in size], device=coordinates.device)
    place = (((coordinates + 1) * (top + 1) - 1) / 2).clamp(min=torch.zeros_like(top), max=top)
    lower = place.detach().floor().long().clamp(max=(top - 1).clamp(min=0))
    fraction = place - lower
    index, weight = [], []
    for corner in itertools.product((0, 1), repeat=d):
        flat, share = torch.zeros_like(lower[..., 0]), torch.ones_like(fraction[..., 0])
        for axis, upper in enumerate(corner):
            flat = flat * size[axis] + (lower[..., axis] + upper).clamp(max=size[axis] - 1)
            share = share * (fraction[..., axis] if upper else 1 - fraction[..., axis])
        index.append(flat)
        weight.append(share)
    return torch.stack(index, dim=1), torch.stack(weight, dim=1)
