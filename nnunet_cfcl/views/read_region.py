"""Regions in which points may lie: places that one or several views read from real image alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nnunet_cfcl.views.geometry import ViewGeometry, to_canonical, to_view
from nnunet_cfcl.views.intersection import bounding_frame
from nnunet_cfcl.views.labels import read_labels

ROUNDS = (2, 4, 8, 16)
"""Proposals per missing point in each round, until all points are found."""

TOLERANCE = 1e-5
"""Share of a voxel by which a read may pass the centre of the outermost real voxel: the rounding of the matrices."""


@dataclass(frozen=True)
class ReadRegion:
    """The places that all views of a group show, for G groups of W views; built by ``read_region``, in float64."""

    views: Tensor
    """(G, W, D, D + 1)"""
    geometry: ViewGeometry
    tissue: Tensor
    """(2, D) canonical millimetres"""
    frame: Tensor
    """(G, D, D + 1): [0, 1]^D to a tight box around the region"""
    empty: Tensor
    """(G,) bool, True where there is no such place"""
    labels: Tensor | None
    """(*crop) label map; places with a label below 0 do not belong to the region"""

    def propose(self, generator: Generator, count: int) -> Tensor:
        """Draw canonical points (G, count, D), uniform in the box around each group's region."""
        unit = torch.rand(len(self.frame), count, self.geometry.dimensions, generator=generator, dtype=torch.float64)
        return to_canonical(unit, self.frame)

    def accepts(self, points: Tensor) -> Tensor:
        """Mask (G, K) the canonical points (G, K, D) that lie in their group's region."""
        accepted = self._reads_tissue(points) & ~self.empty[:, None]
        if self.labels is not None:
            # at the position rounded to float32, which the sampler returns
            accepted &= read_labels(self.labels, points.float(), self.geometry.spacing) >= 0
        return accepted

    def group(self, index: int) -> ReadRegion:
        """Select the region of one group, G = 1."""
        one = slice(index, index + 1)
        return ReadRegion(
            self.views[one], self.geometry, self.tissue, self.frame[one], self.empty[one], self.labels)

    def voxel_boxes(self, crop_size: tuple[int, ...]) -> list[tuple[slice, ...]]:
        """Compute the smallest box of the crop's voxels around the region, per group."""
        size = torch.tensor(crop_size, dtype=torch.float64)
        spacing = torch.tensor(self.geometry.spacing, dtype=torch.float64)
        reach = self.frame[..., :-1].abs().sum(-1) / 2
        centre = self.frame[..., :-1].sum(-1) / 2 + self.frame[..., -1]
        low, high = ((bound / spacing + size / 2).floor() for bound in (centre - reach, centre + reach))
        bounds = torch.stack([low, high + 1], dim=-1).clamp(min=torch.zeros(1), max=size[:, None]).long()
        return [tuple(slice(*ends) for ends in box) for box in bounds.tolist()]

    def _reads_tissue(self, points: Tensor) -> Tensor:
        """Mask (G, K) the points (G, K, D) whose reads use real voxels only, in all views of their group."""
        size = torch.tensor(self.geometry.patch_size, dtype=torch.float64)
        coordinates = to_view(points.unsqueeze(1), self.views)
        inside = (coordinates.abs() <= 1 - 1 / size).all(-1)
        # the cell of 2^D pixel centres around the point; its canonical bounds are exact for an affine view
        cell = ((coordinates + 1) * size / 2 - 0.5).floor().clamp(min=torch.zeros_like(size), max=size - 2)
        middle = to_canonical(2 * (cell + 1) / size - 1, self.views)
        reach = (self.views[..., :-1].abs() / size).sum(-1).unsqueeze(-2)
        slack = TOLERANCE * torch.tensor(self.geometry.spacing, dtype=torch.float64)
        real = (middle - reach >= self.tissue[0] - slack) & (middle + reach <= self.tissue[1] + slack)
        return (inside & real.all(-1)).all(1)


def read_region(views: Tensor, geometry: ViewGeometry, tissue: Tensor, labels: Tensor | None = None) -> ReadRegion:
    """Build the region of groups of views.

    Args:
        views: (G, W, D, D + 1) matrices of the views.
        geometry: patch size and spacing of the views, and spacing of the crop.
        tissue: (2, D) canonical box of real image.
        labels: (*crop) label map; below 0 is outside.
    """
    views, tissue = views.double(), tissue.double()
    groups, d = len(views), geometry.dimensions
    limit = 1 - 1 / torch.tensor(geometry.patch_size, dtype=torch.float64)
    inverse = torch.linalg.inv_ex(views[..., :d]).inverse
    offset = (inverse @ views[..., d:]).squeeze(-1)
    frames = torch.cat([inverse, torch.eye(d, dtype=torch.float64).expand(groups, 1, d, d)], dim=1)
    low = torch.cat([offset - limit, tissue[0].expand(groups, 1, d)], dim=1)
    high = torch.cat([offset + limit, tissue[1].expand(groups, 1, d)], dim=1)
    frame, empty = bounding_frame(frames, low, high)
    return ReadRegion(views, geometry, tissue, frame, empty, labels)
