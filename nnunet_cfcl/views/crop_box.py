"""Crops at the same place in a case and in its counterfactuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class CropBox:
    """A box of voxels that may reach beyond the image, where it is padded.

    Args:
        start: first voxel per spatial axis (Z, Y, X), negative where the crop is larger than the image.
        size: crop size per axis; 1 along Z for two-dimensional crops.
        shape: the image's spatial shape.
        dim: 2 or 3.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int

    @property
    def inside(self) -> tuple[slice, ...]:
        """The part of the box inside the image."""
        bounds = zip(self.start, self.size, self.shape, strict=True)
        return tuple(slice(max(0, s), min(n, s + size)) for s, size, n in bounds)

    @property
    def valid_range(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Voxel ranges [low, high) of real image inside the crop, for its ``dim`` last axes."""
        pairs = [(part.start - s, part.stop - s) for part, s in zip(self.inside, self.start, strict=True)][-self.dim :]
        return tuple(low for low, _ in pairs), tuple(high for _, high in pairs)

    def pad(self, part: np.ndarray, value: float = 0) -> Tensor:
        """Pad the part inside the image (C, z, y, x) to the crop (C, *crop), float32. nnU-Net's loader pads intensities
        with 0, labels with -1."""
        return self._padded(part, mode="constant", constant_values=value)

    def extend(self, part: np.ndarray) -> Tensor:
        """Pad as `pad` does, repeating the intensities at the image's border."""
        return self._padded(part, mode="edge")

    def _padded(self, part: np.ndarray, **how: Any) -> Tensor:
        before = [low.start - s for low, s in zip(self.inside, self.start, strict=True)]
        after = [n - b - m for n, b, m in zip(self.size, before, part.shape[1:], strict=True)]
        padded = np.pad(np.asarray(part, np.float32), [(0, 0), *zip(before, after, strict=True)], **how)
        return torch.from_numpy(padded if self.dim == 3 else padded[:, 0])


def draw_crop_box(generator: Generator, shape: Sequence[int], crop_size: Sequence[int]) -> CropBox:
    """Draw a crop at a uniform position inside the image, centred along axes on which the image is smaller.

    Args:
        generator: CPU generator; three numbers are consumed, whatever the sizes.
        shape: spatial shape (Z, Y, X) of the case.
        crop_size: (D,) size of the crop; for D = 2 one of the Z slices is chosen.
    """
    dim = len(crop_size)
    size = tuple(crop_size) if dim == 3 else (1, *crop_size)
    position = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    room = [n - s for n, s in zip(shape, size, strict=True)]
    start = tuple(int(u * (r + 1)) if r >= 0 else r // 2 for u, r in zip(position, room, strict=True))
    return CropBox(start, size, tuple(shape), dim)


def crop_around(voxel: Sequence[int], shape: Sequence[int], crop_size: Sequence[int]) -> CropBox:
    """Place a crop around a voxel, moved inside the image, centred along axes on which the image is smaller.

    Args:
        voxel: (z, y, x) voxel inside the image.
        shape: spatial shape (Z, Y, X) of the case.
        crop_size: (D,) size of the crop; for D = 2 the crop lies in the voxel's slice.
    """
    dim = len(crop_size)
    sizes = tuple(crop_size) if dim == 3 else (1, *crop_size)
    start = tuple((n - size) // 2 if size > n else min(max(0, at - size // 2), n - size)
                  for at, n, size in zip(voxel, shape, sizes, strict=True))
    return CropBox(start, sizes, tuple(shape), dim)


def read_crop(box: CropBox, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Tensor:
    """Read the part of a crop inside the image with ``read`` and pad it to (C, *crop)."""
    return box.pad(read(box.inside))
