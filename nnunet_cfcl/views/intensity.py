"""Intensity effects of a view: brightness, contrast, blur, solarise (method section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.views.gaussian_blur import gaussian_blur

PERCENTILES = (0.005, 0.995)
"""Percentiles of an image's intensities that are 0 and 1 on the scale of the effects, as shares."""

PERCENTILE_SAMPLES = 8192
"""Number of voxels per image and channel from which the percentiles are estimated."""


class IntensityParameters(NamedTuple):
    """Drawn effects of N images; a NamedTuple, so that ``default_collate`` stacks it."""

    brightness: Tensor
    """(N,) float32 factor, 1 where not applied"""
    contrast: Tensor
    """(N,) float32 factor, 1 where not applied"""
    blur_sigma: Tensor
    """(N,) float32 pixels of the view, 0 where not applied"""
    solarise: Tensor
    """(N,) bool"""


def draw_intensity(
    generator: torch.Generator, settings: ViewSettings, n: int, solarise: Tensor | Sequence[bool],
) -> IntensityParameters:
    """Draw the effects of ``n`` images.

    Args:
        generator: CPU generator; the numbers consumed depend on ``n`` alone.
        solarise: (n,) mask of the images that may be solarised (views of counterfactuals).

    Raises:
        ValueError: ``solarise`` does not have n entries.
    """
    allowed = torch.as_tensor(solarise, dtype=torch.bool)
    if allowed.shape != (n,):
        raise ValueError(f"expected {n} solarise flags, found shape {tuple(allowed.shape)}")
    jitter, blur, invert, brightness, contrast, sigma = torch.rand(6, n, generator=generator)
    jittered = jitter < settings.jitter_probability
    low, high = settings.blur_sigma
    return IntensityParameters(
        brightness=torch.where(jittered, 1 + settings.brightness * (2 * brightness - 1), 1.0),
        contrast=torch.where(jittered, 1 + settings.contrast * (2 * contrast - 1), 1.0),
        blur_sigma=torch.where(blur < settings.blur_probability, low + (high - low) * sigma, 0.0),
        solarise=allowed & (invert < settings.solarise_probability),
    )


def apply_intensity(
    images: Tensor, parameters: IntensityParameters, settings: ViewSettings, spacing: Sequence[float],
) -> Tensor:
    """Apply brightness, contrast, blur and solarise, in this order.

    With v = (x - low) / (high - low), low and high the image's own 0.5 and 99.5 percentiles per channel (before any
    effect): brightness b v; contrast c v + (1 - c) mean(v); Gaussian blur; solarise: 1 - min(v, 1) where v is above
    ``solarise_threshold``; then back to x. These are torchvision's definitions except that brightness and contrast do
    not clip to [0, 1]: nnU-Net's intensities have no such bounds and clipping would erase structure for good. Only
    solarise clips, at the upper end, as an inverted outlier would be darker than anything else. A constant image
    stays as it is, and an image without a range (low = high) is not solarised.

    Args:
        images: (N, C, *S), any floating type; half precision is computed in float32.
        parameters: effects of the N images, on any device (on the CPU they cause no synchronisation).
        spacing: (D,) millimetres; the blur's sigma is in pixels along the finest axis and isotropic in millimetres.

    Returns:
        A new tensor like ``images``.
    """
    if len(parameters.brightness) != len(images):
        raise ValueError(f"expected parameters of {len(images)} images, found {len(parameters.brightness)}")
    with torch.autocast(images.device.type, enabled=False):
        x = images if images.dtype == torch.float64 else images.float()
        low, high = _percentiles(x)
        per_axis = torch.tensor([min(spacing) / step for step in spacing]).to(x)
        x = _jitter(x, low, parameters.brightness, parameters.contrast)
        x = _per_selected(x, parameters.blur_sigma > 0, lambda part, which: gaussian_blur(
            part, parameters.blur_sigma.to(part)[which, None] * per_axis))
        x = _per_selected(x, parameters.solarise, lambda part, which: _solarise(
            part, low[which], high[which], settings.solarise_threshold))
    return x.to(images.dtype)


def _percentiles(images: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the low and the high percentile (N, C, 1, ..) from evenly strided voxels."""
    flat = images.flatten(2)
    # a stride that shares no factor with an axis visits all rows and columns alike
    stride = max(1, math.ceil(flat.shape[-1] / PERCENTILE_SAMPLES))
    while any(math.gcd(stride, size) > 1 for size in images.shape[2:]):
        stride += 1
    sample = flat[..., ::stride]
    ranks = [1 + round(share * (sample.shape[-1] - 1)) for share in PERCENTILES]
    shape = (*images.shape[:2], *[1] * (images.ndim - 2))
    low, high = (sample.kthvalue(rank, dim=-1).values.reshape(shape) for rank in ranks)
    return low, high


def _jitter(x: Tensor, low: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Apply brightness and contrast to the rescaled intensities; their range cancels, so nothing is divided by it."""
    b, c = (factor.to(x).reshape(-1, *[1] * (x.ndim - 1)) for factor in (brightness, contrast))
    mean = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
    return x * (b * c) + (low * (1 - b * c) + (1 - c) * b * (mean - low))


def _solarise(x: Tensor, low: Tensor, high: Tensor, threshold: float) -> Tensor:
    bright = (x > low + threshold * (high - low)) & (high > low)
    return torch.where(bright, low + high - torch.minimum(x, high), x)


def _per_selected(x: Tensor, selected: Tensor, effect: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply ``effect(images, indices)`` to the selected images, in place."""
    which = selected.nonzero().squeeze(-1).to(x.device)
    if len(which):
        x[which] = effect(x[which], which)
    return x
