"""Class-balanced sampling of points, so that small organs have anchors in the supervised objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from nnunet_cfcl.views.labels import read_labels
from nnunet_cfcl.views.read_region import ROUNDS, ReadRegion

POOL = 4
"""Uniform proposals per balanced point; they fill the frequent classes, so that only rare ones are searched."""

LARGEST_LABEL = 2**15 - 2


@dataclass(frozen=True)
class ClassBalance:
    """Labels of a crop and the share of the points that is drawn class by class.

    Of P points, n = round(``share`` P) are divided evenly among the foreground classes of the crop; the remainder goes
    to random classes. The points of a class are independent and uniform over its voxels (not only their centres), as
    far as the views read them from real image. Points that a class cannot fill, because it lies outside the views, and
    all other points are uniform over the views, as without balance. The density of the points is therefore not uniform:
    with n_c points of class c, |c| its volume inside the views and |A| the volume of the views, it is
    n_c / |c| + (P - sum n) / |A| in class c. A class of few voxels has many points close together, which are nearly the
    same anchor.

    No point lies on a label below 0 ("ignored").

    Args:
        labels: (*crop) labels of any integer type, at most 32766, on the CPU; below 0 is ignored.
        share: balanced share in [0, 1]; 0 or a crop without foreground: uniform over the labelled voxels.
        background: label that is not a class.

    Raises:
        ValueError: share or labels are out of range, or the labels are not integers.
    """

    labels: Tensor
    share: float
    background: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], found {self.share}")
        if self.labels.is_floating_point() or self.labels.is_complex():
            raise ValueError(f"labels must be integers, found {self.labels.dtype}")
        if int(self.labels.max()) > LARGEST_LABEL:
            raise ValueError(f"labels must be at most {LARGEST_LABEL}, found {int(self.labels.max())}")

    def known_labels(self) -> Tensor:
        """Return the labels as int16, -1 for all ignored voxels."""
        # unsigned types have no -1; wide ones are clamped before values overflow int16
        signed = self.labels if self.labels.is_signed() else self.labels.to(torch.int16)
        return signed.clamp(min=-1).to(torch.int16)


def draw_balanced(
    generator: Generator, region: ReadRegion, balance: ClassBalance, count: int,
) -> tuple[Tensor, Tensor]:
    """Draw the balanced part of ``count`` points per group.

    Returns:
        Points (G, K, D) float64 in canonical millimetres and the mask (G, K) bool, False where a class could not be
        filled.
    """
    assert region.labels is not None
    quota = _quotas(generator, region.labels, balance.background, round(balance.share * count))
    pool = region.propose(generator, POOL * int(quota.sum()))
    accepted = region.accepts(pool)
    found = []
    for group, box in enumerate(region.voxel_boxes(region.labels.shape)):
        hits = pool[group, accepted[group]]
        classes = read_labels(region.labels, hits.float(), region.geometry.spacing)
        chosen = _first_of_each(classes, quota)
        missing = quota - classes[chosen].bincount(minlength=len(quota))
        rare = _draw_in_voxels(generator, region.group(group), region.labels, box, missing)
        found.append(torch.cat([hits[chosen], rare]))
    return _pad(found)


def draw_labelled(generator: Generator, region: ReadRegion, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Draw up to ``missing`` (G,) further points, uniform over the labelled voxels, where rejection found too few.

    Rejection fails where most voxels are ignored; in a crop without ignored voxels no point is drawn.

    Returns:
        Points and mask as ``draw_balanced``.
    """
    assert region.labels is not None
    found = [torch.zeros(0, region.geometry.dimensions, dtype=torch.float64)] * len(missing)
    if bool((missing > 0).any()) and bool((region.labels < 0).any()):
        labelled = (region.labels >= 0).to(torch.int16)
        quotas = torch.stack([torch.zeros_like(missing), missing.clamp(min=0)], dim=-1)
        boxes = region.voxel_boxes(labelled.shape)
        found = [_draw_in_voxels(generator, region.group(group), labelled, boxes[group], quota)
                 for group, quota in enumerate(quotas)]
    return _pad(found)


def _quotas(generator: Generator, labels: Tensor, background: int, total: int) -> Tensor:
    """Compute the number of points of every label: (L,) for labels 0 .. L - 2; the last entry, for label -1, is 0."""
    present = (labels.flatten() + 1).bincount()[1:] > 0
    if 0 <= background < len(present):
        present[background] = False
    classes = present.nonzero()[:, 0]
    quota = torch.zeros(len(present) + 1, dtype=torch.int64)
    if total and len(classes):
        quota[classes] = total // len(classes)
        quota[classes[torch.randperm(len(classes), generator=generator)[:total % len(classes)]]] += 1
    return quota


def _first_of_each(classes: Tensor, quota: Tensor) -> Tensor:
    """Find the indices of the first ``quota[c]`` entries of every class c in ``classes`` (K,)."""
    ordered, order = classes.sort(stable=True)
    rank = torch.arange(len(ordered)) - torch.searchsorted(ordered, ordered)
    return order[rank < quota[ordered]]


def _draw_in_voxels(
    generator: Generator, region: ReadRegion, labels: Tensor, box: tuple[slice, ...], quota: Tensor,
) -> Tensor:
    """Draw points (K, D) of the only group of ``region``, uniform in the voxels of each class, up to ``quota[c]`` of
    class c."""
    found = [torch.zeros(0, region.geometry.dimensions, dtype=torch.float64)]
    if not bool(quota.any()):
        return found[0]
    voxels, classes, size = _voxels_by_class(labels, box, quota)
    start = size.cumsum(0) - size
    for effort in ROUNDS:
        wanted = torch.arange(len(classes)).repeat_interleave(effort * quota[classes])
        if len(wanted) == 0:
            break
        drawn = torch.rand(len(wanted), generator=generator, dtype=torch.float64)
        voxel = voxels[start[wanted] + (drawn * size[wanted]).long()]
        points, of_class = _draw_inside(generator, voxel, box, labels.shape, region), classes[wanted]
        # read the label again: rounding to float32 may move a point into the next voxel
        same = read_labels(labels, points.float(), region.geometry.spacing) == of_class
        good = same & region.accepts(points[None])[0]
        chosen = good.nonzero()[:, 0]
        chosen = chosen[_first_of_each(of_class[chosen], quota)]
        found.append(points[chosen])
        quota = quota - of_class[chosen].bincount(minlength=len(quota))
    return torch.cat(found)


def _voxels_by_class(labels: Tensor, box: tuple[slice, ...], quota: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the voxels of the classes with a quota: flat indices in the box, class after class, the classes, and their
    numbers of voxels."""
    part = labels[box].numpy()
    voxels = np.flatnonzero(np.isin(part, quota.nonzero()[:, 0].numpy()))
    values = part.reshape(-1)[voxels]
    order = values.argsort(kind="stable")
    classes, size = torch.from_numpy(values[order]).long().unique_consecutive(return_counts=True)
    return torch.from_numpy(voxels[order]), classes, size


def _draw_inside(
    generator: Generator, voxels: Tensor, box: tuple[slice, ...], crop_size: Sequence[int], region: ReadRegion,
) -> Tensor:
    """Draw canonical points (K, D), each uniform in its voxel, given as flat index (K,) in the box."""
    index = np.unravel_index(voxels.numpy(), [part.stop - part.start for part in box])
    corner = torch.tensor([part.start for part in box], dtype=torch.float64)
    size, spacing = (torch.tensor(values, dtype=torch.float64) for values in (crop_size, region.geometry.spacing))
    place = torch.rand(len(voxels), len(box), generator=generator, dtype=torch.float64)
    return (corner + torch.from_numpy(np.stack(index, axis=-1)) + place - size / 2) * spacing


def _pad(found: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack G lists of points to (G, K, D), with the mask (G, K) of the points."""
    lengths = torch.tensor([len(points) for points in found])
    padded = pad_sequence(found, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
