"""Where a patch is put in an image, and how much it counts there, by nnU-Net's own functions."""

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
    """The windows of nnU-Net's prediction; called with an image's shape, see `blended_change.Windows`. Picklable.

    An image with more axes than the patch is taken slice by slice. Where it is smaller than the patch there is one
    window, centred, that reaches beyond.

    Attributes:
        patch_size: (D,) voxels.
        step: distance of neighbouring windows, relative to the patch; smaller where it would not divide the image.
    """

    patch_size: tuple[int, ...]
    step: float = 0.5

    def __call__(self, shape: Sequence[int]) -> list[AxisWindows]:
        """The windows along every axis of an image of this spatial shape."""
        slices, plane = shape[: -len(self.patch_size)], shape[-len(self.patch_size) :]
        along = [AxisWindows(tuple(range(count)), torch.ones(count, 1)) for count in slices]
        # nnU-Net's function wants images no smaller than the patch
        reach = tuple(max(n, size) for n, size in zip(plane, self.patch_size, strict=True))
        steps = compute_steps_for_sliding_window(reach, self.patch_size, self.step)
        for n, size, found in zip(plane, self.patch_size, steps, strict=True):
            starts = tuple(start + min(0, n - size) // 2 for start in sorted(set(found)))
            along.append(AxisWindows(starts, _shares(starts, size)))
        return along


def _shares(starts: Sequence[int], size: int) -> Tensor:
    """(windows, size) of the Gaussian weight in the sum over all windows.

    nnU-Net's Gaussian of a patch is the product of those along its axes, and windows lie on a grid, so that sums may be
    taken axis by axis: no map of a whole volume is needed.
    """
    # past its cache of two, in which the prediction itself keeps the Gaussian of a patch
    profile = inspect.unwrap(compute_gaussian)((size,), dtype=torch.float64, device=torch.device("cpu"))
    voxels = torch.tensor(starts)[:, None] - starts[0] + torch.arange(size)
    total = torch.zeros(int(voxels.max()) + 1, dtype=torch.float64)
    total.index_add_(0, voxels.flatten(), profile.repeat(len(starts)))
    return (profile / total[voxels]).float()
