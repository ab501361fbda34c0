"""Features of overlapping windows, blended and placed in the plane of the colours, slab by slab.

A map of all channels of a volume would need many times the memory of the prediction itself. Windows come in order along
the first axis, so that whatever lies before the next window is final: it is turned into its two plane coordinates, and
only a slab as deep as a window is kept with more channels. Coordinates are what may be interpolated later; a hue is an
angle and may not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_cfcl.views.blending import AxisWindows, forget_planes, outer_shares

#: Position of a window along the axes of the image; a number where the window is one slice.
Box = Sequence[slice | int]


class PlaneAccumulator:
    """Blend windows, added in ascending order along the first axis, into the coordinates of all voxels.

    Args:
        windows: positions of the windows along every axis of the image and their shares, which add up to 1 in every
            voxel: nnU-Net's own weights are 0 in half precision where a single window reaches into a corner.
        shape: (Z, Y, X) of the image in voxels.
        place: reduced features (k, *S) in float32 -> coordinates (2, *S).
        device: device on which windows are added up.
    """

    def __init__(
        self, windows: Sequence[AxisWindows], shape: Sequence[int], place: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self._shape, self._place, self._device = tuple(shape), place, device
        self._shares = [dict(zip(axis.starts, axis.shares.to(device))) for axis in windows]
        self._depth = windows[0].shares.shape[1]
        self._coordinates = torch.zeros((2, *self._shape), dtype=torch.float16, device=device)
        self._sum: Tensor | None = None
        self._start = 0
        self._added: set[tuple[int, ...]] = set()

    def add(self, box: Box, features: Tensor) -> None:
        """Add a window's reduced features (k, *window), half precision; a repeated position does not count.

        Raises:
            ValueError: the window lies before an earlier one.
        """
        starts = tuple(one if isinstance(one, int) else one.start for one in box)
        if starts in self._added:
            return  # nnU-Net repeats windows where its step is less than a voxel
        self._added.add(starts)
        if starts[0] < self._start:
            raise ValueError(f"windows must come in order along the first axis, found {starts[0]} after {self._start}")
        shares = [axis[start] for axis, start in zip(self._shares, starts)]
        if self._sum is None:
            slab = (len(features), self._depth, *self._shape[1:])
            self._sum = torch.zeros(slab, dtype=torch.float16, device=self._device)
        self._finish_before(starts[0])
        share = outer_shares([shares], self._device)[0, 0].half()
        here = (slice(None), slice(None), *(slice(at, at + len(one)) for at, one in zip(starts[1:], shares[1:])))
        self._sum[here] += features.to(self._device, torch.float16).view(len(features), *share.shape) * share

    def coordinates(self) -> Tensor:
        """(2, Z, Y, X), half precision, when all windows were added; nothing can be added afterwards."""
        self._finish_before(self._shape[0])
        return self._coordinates

    def _finish_before(self, row: int) -> None:
        """Compute the coordinates of the rows from the slab's start to ``row``, where the slab begins from now on."""
        rows = min(row - self._start, self._depth)
        if rows <= 0 or self._sum is None:
            return
        for z in range(rows):
            self._coordinates[:, self._start + z] = self._place(self._sum[:, z].float())
        forget_planes(self._sum, 1, rows)
        self._start = row
