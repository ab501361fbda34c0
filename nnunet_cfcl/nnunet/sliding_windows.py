"""Positions and Gaussian weights of nnU-Net's sliding-window prediction, by its own functions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor

from nnunet_cfcl.views.blending import AxisWindows


@dataclass(frozen=True)
class SlidingWindows:
    """Windows of nnU-Net's prediction, called with an image's shape; picklable.

    An image with more axes than the patch is covered slice by slice. Along an axis shorter than the patch there is one
    centred window, which extends beyond the image.

    Attributes:
        patch_size: (D,) in voxels.
        step: maximum distance between neighbouring windows as a fraction of the patch size.
    """

    patch_size: tuple[int, ...]
    step: float = 0.5

    def __call__(self, shape: Sequence[int]) -> list[AxisWindows]:
        """Windows along every axis of an image of this spatial shape."""
        slices, plane = shape[: -len(self.patch_size)], shape[-len(self.patch_size) :]
        along = [AxisWindows(tuple(range(count)), torch.ones(count, 1)) for count in slices]
        # nnU-Net's function requires images at least as large as the patch
        reach = tuple(max(n, size) for n, size in zip(plane, self.patch_size, strict=True))
        steps = compute_steps_for_sliding_window(reach, self.patch_size, self.step)
        for n, size, found in zip(plane, self.patch_size, steps, strict=True):
            starts = tuple(start + min(0, n - size) // 2 for start in sorted(set(found)))
            along.append(AxisWindows(starts, _shares(starts, size)))
        return along


def _shares(starts: Sequence[int], size: int) -> Tensor:
    """Share (windows, size) of each window's Gaussian weight in the sum over all windows.

    nnU-Net's Gaussian of a patch is a product over the axes and the windows form a grid: the sums can be computed per
    axis, without a weight map of the whole volume.
    """
    # bypasses its cache of two entries, which holds the Gaussian that the prediction itself uses
    profile = inspect.unwrap(compute_gaussian)((size,), dtype=torch.float64, device=torch.device("cpu"))
    voxels = torch.tensor(starts)[:, None] - starts[0] + torch.arange(size)
    total = torch.zeros(int(voxels.max()) + 1, dtype=torch.float64)
    total.index_add_(0, voxels.flatten(), profile.repeat(len(starts)))
    return (profile / total[voxels]).float()
