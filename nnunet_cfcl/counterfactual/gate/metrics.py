"""Figures of pairs of images that the gate is made of; none of them knows a generator."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles

#: Quantiles that stand for an intensity distribution.
LEVELS = 513
#: A voxel is changed where its intensity moves by more than so many standard deviations.
CHANGED = 0.1


def channel_spread(images: Tensor) -> Tensor:
    """(C,) standard deviation of the voxels of all images (N, C, *S); 1 for a channel that never changes."""
    spread = images.transpose(0, 1).flatten(1).double().std(1, correction=0).float()
    return torch.where(spread > 1e-6, spread, 1.0)


def mean_change(one: Tensor, other: Tensor, spread: Tensor) -> float:
    """Mean of |one - other| over all voxels, channels and images (N, C, *S), in standard deviations ``spread`` (C,)."""
    return float(_scaled_difference(one, other, spread).mean())


def changed_share(one: Tensor, other: Tensor, spread: Tensor) -> float:
    """Share of the voxels whose intensity differs by more than `CHANGED` standard deviations in some channel."""
    return float((_scaled_difference(one, other, spread) > CHANGED).any(1).float().mean())


def _scaled_difference(one: Tensor, other: Tensor, spread: Tensor) -> Tensor:
    return (one - other).abs() / spread.view(-1, *[1] * (one.ndim - 2))


def edge_strength(images: Tensor) -> Tensor:
    """Magnitude of the gradient of images (N, C, *S), by Gaussian derivatives with a sigma of one voxel; float32."""
    maps = [[ndimage.gaussian_gradient_magnitude(channel.numpy(), 1.0, mode="nearest") for channel in image]
            for image in images.float()]
    return torch.from_numpy(np.array(maps, dtype=np.float32))


def structure_agreement(one: Tensor, other: Tensor) -> Tensor:
    """How far two images have their edges at the same places: correlation of their `edge_strength`.

    It has no sign, so that inverted contrast counts as the same structure; tissues whose contrast a scanner changes
    more or less than that of others lower it. It is what remains of normalised gradient fields (Haber and Modersitzki
    2006, "Intensity gradient based registration and fusion of multi-modal images") when directions are left out, which
    agree by chance between any two images of the same organ.

    Args:
        one, other: (N, C, *S), of `edge_strength`.

    Returns:
        (N,) float64 in [-1, 1], averaged over the channels that have any structure; NaN without one.
    """
    centred = [edges.flatten(2).double() - edges.flatten(2).double().mean(2, keepdim=True) for edges in (one, other)]
    norms = [edges.norm(dim=2) for edges in centred]
    known = (norms[0] > 1e-6) & (norms[1] > 1e-6)
    correlations = (centred[0] * centred[1]).sum(2) / (norms[0] * norms[1])
    return torch.where(known, correlations, torch.nan).nanmean(1)


def intensity_distance(one: Tensor, other: Tensor, spread: Tensor) -> float:
    """Wasserstein-1 distance of two groups' intensities, in standard deviations, averaged over the channels.

    That is the mean distance of their quantile functions (Vallender 1974), here at `LEVELS` levels. All images of a
    group are one distribution, so that what differs between its patients does not count as a distance.

    Args:
        one: (N, C, *S).
        other: (M, C, *S).
        spread: (C,).
    """
    tables = [intensity_quantiles(images.transpose(0, 1), LEVELS) for images in (one, other)]
    return float(((tables[0] - tables[1]).abs() / spread[:, None]).mean())
