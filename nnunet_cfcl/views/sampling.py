"""Sampling of corresponding points in views, and reading of features there (method sections 4 and 6)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from nnunet_cfcl.views.class_balance import ClassBalance, draw_balanced, draw_labelled
from nnunet_cfcl.views.geometry import ViewGeometry
from nnunet_cfcl.views.read_region import ROUNDS, ReadRegion, read_region


def tissue_box(
    valid_low: Sequence[int] | Tensor, valid_high: Sequence[int] | Tensor, crop_size: Sequence[int],
    spacing: Sequence[float],
) -> Tensor:
    """Compute the canonical box spanned by the centres of a crop's real voxels.

    Args:
        valid_low, valid_high: (D,) voxel indices inside the crop; real image in [low, high), padding elsewhere.
        crop_size: (D,) voxels of the crop.
        spacing: (D,) millimetres.

    Returns:
        (2, D) float64 millimetres: lowest and highest voxel centre; low > high if there is no real voxel.
    """
    low, high, size, step = (
        torch.as_tensor(values, dtype=torch.float64) for values in (valid_low, valid_high, crop_size, spacing))
    return torch.stack([low + 0.5 - size / 2, high - 0.5 - size / 2]) * step


def draw_corresponding_points(
    generator: Generator, matrices: Tensor, geometry: ViewGeometry, tissue_box: Tensor, count: int,
    balance: ClassBalance | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw points that view 0 and view i both show, for i = 1 .. V - 1.

    Points are independent and uniform over all places where the (tri)linear reads in both views (2^D pixels each) use
    real image only: inside the outermost pixel centres of both views, and every pixel read inside the tissue box.
    Rejection from the smallest box around the intersection of the two views and the tissue. With ``balance`` a share
    of them favours rare classes, see ``ClassBalance``.

    Args:
        generator: CPU generator; one number is consumed.
        matrices: (V, D, D + 1) views of one image, on the CPU.
        tissue_box: (2, D) canonical millimetres, see ``tissue_box``.
        count: points per pair P.
        balance: labels of the crop and the share of class-balanced points; None: uniform points.

    Returns:
        points (V - 1, P, D) float32, canonical millimetres, and valid (V - 1, P) bool. Where fewer than P were found
        (views that share little tissue), the others are finite and marked False.

    Raises:
        ValueError: labels and views differ in the number of axes.
    """
    first = matrices[:1].expand(len(matrices) - 1, -1, -1)
    return _draw_points(generator, torch.stack([first, matrices[1:]], dim=1), geometry, tissue_box, count, balance)


def draw_view_points(
    generator: Generator, matrices: Tensor, geometry: ViewGeometry, tissue_box: Tensor, count: int,
    balance: ClassBalance | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw points that a view shows, for every view separately; the multi-view objectives pool them.

    Arguments, distribution and errors as for ``draw_corresponding_points``, with one view in place of the pair.

    Returns:
        points (V, P, D) float32, canonical millimetres, and valid (V, P) bool.
    """
    return _draw_points(generator, matrices.unsqueeze(1), geometry, tissue_box, count, balance)


def _draw_points(
    generator: Generator, groups: Tensor, geometry: ViewGeometry, tissue: Tensor, count: int,
    balance: ClassBalance | None,
) -> tuple[Tensor, Tensor]:
    """Draw points (G, P, D) that all views of a group (G, W, D, D + 1) show, with the mask (G, P) of valid points."""
    # a separate generator: any number of rounds consumes one number of the caller's
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
    labels = None if balance is None else balance.known_labels()
    region = read_region(groups, geometry, tissue, labels)
    if balance is None:
        drawn = [_draw_uniform(own, region, count)]
    else:
        drawn = [draw_balanced(own, region, balance, count)]
        drawn.append(_draw_uniform(own, region, count - int(_found(drawn).min())))
        drawn.append(draw_labelled(own, region, count - _found(drawn)))
    points, good = (torch.cat(parts, dim=1) for parts in zip(*drawn))
    valid, order = good.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    chosen = order[:, :count, None].expand(-1, -1, geometry.dimensions)
    return points.gather(1, chosen).float(), valid[:, :count].bool()


def _found(drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Count the valid points drawn so far, (G,)."""
    return torch.cat([good for _, good in drawn], dim=1).sum(-1)


def _draw_uniform(generator: Generator, region: ReadRegion, count: int) -> tuple[Tensor, Tensor]:
    """Draw proposals (G, K, D) with the mask (G, K) of accepted ones, ``count`` per group where possible."""
    proposals, accepted = [], []
    for effort in ROUNDS:
        proposals.append(region.propose(generator, effort * count))
        accepted.append(region.accepts(proposals[-1]))
        found = sum(part.sum(-1) for part in accepted)
        if bool(((found >= count) | region.empty).all()):
            break
    return torch.cat(proposals, dim=1), torch.cat(accepted, dim=1)


def read_features(features: Tensor, coordinates: Tensor) -> Tensor:
    """Read a feature map at arbitrary points by (bi/tri)linear interpolation between pixel centres.

    The 2^D neighbours are gathered, then interpolated in float32, so that a half precision map is never copied as a
    whole. Beyond the outermost pixel centres the border value continues. Differentiable in both arguments.

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
    """Compute flat indices and weights (N, 2^D, K) of the pixels around normalised coordinates (N, K, D)."""
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
