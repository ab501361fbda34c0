"""A small table that stands for an image's intensity distribution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLED_VOXELS = 100_000


def intensity_quantiles(
    image: NDArray[np.floating] | Tensor, count: int = 65, inside: NDArray[np.bool_] | Tensor | None = None
) -> Tensor:
    """Quantiles at the levels (i + 0.5) / count of every channel.

    The members stand for equal shares of the voxels, so their plain mean and standard deviation approximate the
    image's, and the outermost ones (0.8 and 99.2 percent for 65) are robust ends of its range: no minimum or maximum
    of single voxels enters.

    Args:
        image: (C, *S); not-finite values are not looked for.
        count: number of levels Q.
        inside: (*S), voxels that count (for nnU-Net's masked z-scoring: segmentation >= 0); None: all.
            Without a single one inside every voxel counts.

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
    """Strides that thin out the finest-sampled axis first, until few enough voxels are left."""
    steps = [1] * len(shape)
    kept = list(shape)
    while np.prod(kept) > SAMPLED_VOXELS:
        axis = int(np.argmax(kept))
        steps[axis] += 1
        kept[axis] = -(-shape[axis] // steps[axis])
    return tuple(slice((n - 1) % step // 2, None, step) for n, step in zip(shape, steps, strict=True))
