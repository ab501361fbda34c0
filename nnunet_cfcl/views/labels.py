"""Label maps in canonical and in view coordinates; labels below 0 are unknown and ignored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_cfcl.views.geometry import ViewGeometry, cut_views


def read_labels(labels: Tensor, points: Tensor, spacing: Sequence[float]) -> Tensor:
    """Read the label of the voxel that contains each point.

    Voxel k of n along an axis spans [k - n/2, k + 1 - n/2) times the spacing, with its centre at k + 0.5 - n/2. On the
    plane between two voxels the upper one is read.

    Args:
        labels: (*crop) label map of any integer type.
        points: (..., D) canonical millimetres, array-axis order.
        spacing: (D,) voxel size in millimetres.

    Returns:
        Labels (...) int64, -1 outside the crop.

    Raises:
        ValueError: the labels are not integers, or the numbers of axes differ.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, found {labels.dtype}")
    if not labels.ndim == points.shape[-1] == len(spacing):
        raise ValueError(f"labels {tuple(labels.shape)}, points {tuple(points.shape)} and spacing {tuple(spacing)} "
                         "must have the same number of axes")
    size, step = (torch.tensor(values, dtype=torch.float64, device=points.device) for values in (labels.shape, spacing))
    place = (points.double() / step + size / 2).floor()
    inside = ((place >= 0) & (place < size)).all(-1)
    index = torch.where(inside[..., None], place, 0).long()
    return torch.where(inside, labels[index.unbind(-1)].long(), -1)


def apply_affine_labels(labels: Tensor, matrices: Tensor, geometry: ViewGeometry) -> Tensor:
    """Cut views out of label maps by nearest-neighbour interpolation.

    The counterpart of ``apply_affine_views`` for label maps and other values that must not be interpolated, such as the
    confidence of the labels.

    Args:
        labels: (N, 1, *crop) of any type; integers up to 2^24 are exact.
        matrices: (N, D, D + 1) views, one per map.
        geometry: patch size and spacing of crop and view.

    Returns:
        (N, 1, *patch), dtype of ``labels``; 0 outside the crop (which drawn views never reach, see ``crop_size``).
    """
    return cut_views(labels, matrices, geometry, "nearest")
