"""Quantile table of an image's intensity distribution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLED_VOXELS = 100_000


def intensity_quantiles(
    image: NDArray[np.floating] | Tensor, count: int = 65, inside: NDArray[np.bool_] | Tensor | None = None
) -> Tensor:
    """Compute quantiles at the levels (i + 0.5) / count of every channel.

    The quantiles represent equal shares of the voxels, so that their plain mean and standard deviation approximate the
    image's. The outermost quantiles (0.8 and 99.2 percent for 65 levels) are robust ends of the range.

    Args:
        image: (C, *S), finite.
        count: number of levels Q.
        inside: (*S), voxels to include (for nnU-Net's masked z-scoring: segmentation >= 0); None, or no voxel inside:
            all voxels.

    Returns:
        (C, Q) float32, each row ascending, on the CPU; from at most 100,000 voxels on a regular grid.
    """
    array = _as_numpy(image)
    grid = _sampling_grid(array.shape[1:])
    sample = array[(slice(None), *grid)].reshape(array.shape[0], -1)
    if inside is not None:
        chosen = _as_numpy(inside)[grid].reshape(-1).astype(bool)
        sample = sample[:, chosen] if chosen.any() else sample
    levels = (np.arange(count) + 0.5) / count
    table = np.quantile(sample.astype(np.float32, copy=False), levels, axis=1).T
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.float32))


def _as_numpy(array: NDArray | Tensor) -> NDArray:
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def _sampling_grid(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Strided slices with at most `SAMPLED_VOXELS` voxels; the longest axis is thinned out first."""
    steps = [1] * len(shape)
    kept = list(shape)
    while np.prod(kept) > SAMPLED_VOXELS:
        axis = int(np.argmax(kept))
        steps[axis] += 1
        kept[axis] = -(-shape[axis] // steps[axis])
    return tuple(slice((n - 1) % step // 2, None, step) for n, step in zip(shape, steps, strict=True))
