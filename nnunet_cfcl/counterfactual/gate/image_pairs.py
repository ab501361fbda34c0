"""The gate's metrics of pairs of images, independent of any generator."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles

#: Quantile levels that represent an intensity distribution.
LEVELS = 513
#: Intensity difference, in standard deviations, above which a voxel counts as changed.
CHANGED = 0.1


def channel_std(images: Tensor) -> Tensor:
    """Standard deviation (C,) of the voxels of all images (N, C, *S); 1 for a constant channel."""
    std = images.transpose(0, 1).flatten(1).double().std(1, correction=0).float()
    return torch.where(std > 1e-6, std, 1.0)


def mean_change(one: Tensor, other: Tensor, std: Tensor) -> float:
    """Mean of |one - other| over all voxels, channels and images (N, C, *S), in standard deviations ``std`` (C,)."""
    return float(_scaled_difference(one, other, std).mean())


def changed_share(one: Tensor, other: Tensor, std: Tensor) -> float:
    """Fraction of voxels whose intensity differs by more than `CHANGED` standard deviations in some channel."""
    return float((_scaled_difference(one, other, std) > CHANGED).any(1).float().mean())


def _scaled_difference(one: Tensor, other: Tensor, std: Tensor) -> Tensor:
    return (one - other).abs() / std.view(-1, *[1] * (one.ndim - 2))


def edge_strength(images: Tensor) -> Tensor:
    """Gradient magnitude of images (N, C, *S), by Gaussian derivatives with a sigma of one voxel; float32."""
    maps = [[ndimage.gaussian_gradient_magnitude(channel.numpy(), 1.0, mode="nearest") for channel in image]
            for image in images.float()]
    return torch.from_numpy(np.array(maps, dtype=np.float32))


def structure_agreement(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of the `edge_strength` of two images: whether their edges are at the same positions.

    Edge strength has no sign, so that inverted contrast counts as the same structure; contrast changes that differ
    between tissues lower the correlation. This corresponds to normalised gradient fields (Haber and Modersitzki 2006,
    "Intensity gradient based registration and fusion of multi-modal images") without the gradients' directions, which
    agree by chance between any two images of the same organ.

    Args:
        one, other: (N, C, *S), each from `edge_strength`.

    Returns:
        (N,) float64 in [-1, 1], averaged over the channels with any structure; NaN without such a channel.
    """
    centred = [edges.flatten(2).double() - edges.flatten(2).double().mean(2, keepdim=True) for edges in (one, other)]
    norms = [edges.norm(dim=2) for edges in centred]
    known = (norms[0] > 1e-6) & (norms[1] > 1e-6)
    correlations = (centred[0] * centred[1]).sum(2) / (norms[0] * norms[1])
    return torch.where(known, correlations, torch.nan).nanmean(1)


def intensity_distance(one: Tensor, other: Tensor, std: Tensor) -> float:
    """Wasserstein-1 distance of two groups' intensities, in standard deviations, averaged over the channels.

    This is the mean distance of their quantile functions (Vallender 1974), here at `LEVELS` levels. All images of a
    group form one distribution, so that differences between its patients do not count.

    Args:
        one: (N, C, *S), images of the first group.
        other: (M, C, *S), images of the second group.
        std: (C,) standard deviation of each channel.
    """
    tables = [intensity_quantiles(images.transpose(0, 1), LEVELS) for images in (one, other)]
    return float(((tables[0] - tables[1]).abs() / std[:, None]).mean())
