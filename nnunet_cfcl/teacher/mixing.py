"""Boxes exchanged between images, with their labels (CutMix, Yun et al. 2019, arXiv 1905.04899)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from nnunet_cfcl.teacher.pseudo_labels import PseudoLabels

#: Largest factor between a box's side and that of a cube of the same volume, relative to the patch.
ASPECT = 2.0


class Boxes(NamedTuple):
    """A box of each of N images, and the image that fills it.

    Attributes:
        donor: (N,) int64 index among the donors; -1: the image stays as it is.
        low, high: (N, D) int64 voxel ranges [low, high).
    """

    donor: Tensor
    low: Tensor
    high: Tensor

    def slices(self) -> list[tuple[int, int, tuple[slice, ...]]]:
        """Image, donor and box, with all channels, of every image that has a box."""
        rows = zip(*(part.tolist() for part in self))
        return [(image, donor, (slice(None), *(slice(a, b) for a, b in zip(low, high))))
                for image, (donor, low, high) in enumerate(rows) if donor >= 0]

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(N, 1, *shape) bool: the boxes' voxels."""
        inside = torch.zeros(len(self.donor), 1, *shape, dtype=torch.bool)
        for image, _, box in self.slices():
            inside[image][box] = True
        return inside


def draw_boxes(
    generator: Generator, images: int, donors: int, shape: Sequence[int], probability: float,
    size: tuple[float, float],
) -> Boxes:
    """Draw boxes; the donor of an image is any other image, donor n being image n for n below ``images``.

    Args:
        generator: CPU generator; the numbers consumed do not depend on what is drawn.
        images: number of images N.
        donors: number of donors, at least N: the images themselves, then further ones.
        shape: (D,) of the patch in voxels.
        probability: probability that an image gets a box.
        size: range of the box's area or volume relative to the patch; log-uniform aspect within `ASPECT`.
    """
    dim = len(shape)
    u = torch.rand(images, 3 + 2 * dim, generator=generator, dtype=torch.float64)
    others = torch.arange(images) + 1 + (u[:, 1] * (donors - 1)).long()
    donor = torch.where((u[:, 0] < probability) & (donors > 1), others % donors, -1)
    share = size[0] + (size[1] - size[0]) * u[:, 2]
    aspect = math.log(ASPECT) * (2 * u[:, 3 : 3 + dim] - 1)
    sides = (share.log()[:, None] / dim + aspect - aspect.mean(1, keepdim=True)).exp().clamp(max=1)
    extent = torch.tensor(shape)
    voxels = (sides * extent).round().long().clamp_min(1)
    low = (u[:, 3 + dim :] * (extent - voxels + 1)).long()
    return Boxes(donor, low, low + voxels)


def apply_boxes(
    images: Tensor, pseudo: PseudoLabels, boxes: Boxes, donors: Tensor, donor_labels: PseudoLabels
) -> tuple[Tensor, PseudoLabels]:
    """Replace the boxes' voxels, labels and masks by their donors'; new tensors.

    Args:
        images: (N, C, *S).
        pseudo: their labels.
        boxes: of the N images.
        donors: (M, C, *S).
        donor_labels: the donors' labels.
    """
    images, labels, known = images.clone(), pseudo.labels.clone(), pseudo.known.clone()
    for image, donor, box in boxes.slices():
        images[image][box] = donors[donor][box]
        labels[image][box] = donor_labels.labels[donor][box]
        known[image][box] = donor_labels.known[donor][box]
    return images, PseudoLabels(labels, known)
