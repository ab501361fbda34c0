"""Analytic interventions on the acquisition: the same patient on another scanner, without known attributes.

Four effects act in the order of image formation: the bias field on the tissue's signal, the point spread of the system,
the transfer curve to grey values, the noise. ``draw_acquisition`` draws their parameters, ``apply_acquisition`` is a
pure function of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual.acquisition.bias_field import draw_log_bias_field, log_bias_field
from nnunet_cfcl.counterfactual.acquisition.transfer_curve import apply_transfer_curve, draw_transfer_curve
from nnunet_cfcl.views.gaussian_blur import gaussian_blur


class AcquisitionParameters(NamedTuple):
    """Parameters of n acquisitions of one image; ``default_collate`` stacks them to (B, n, ...).

    Attributes:
        curve_x: (n, C, K) evenly spaced intensities over the robust range of the case, ascending.
        curve_y: (n, C, K) the intensities they are mapped to, not descending.
        bounds: (n, C, 2) lower and upper bound of the intensities; infinite where the normalisation sets none.
        bias_field: (n, 4, ..., 4) control points of the log bias field, D axes; 0: none.
        point_spread: (n,) sigma in in-plane voxels; 0: none.
        noise_sd: (n, C) standard deviation of the noise in the image's intensity units; 0: none.
        noise_correlation: (n,) sigma of the noise's own point spread in in-plane voxels; 0: white.
        noise_seed: (n,) int64, seed of the noise; may stay on the CPU.
        keeps_moments: (n, C) bool, whether the channel is z-scored, so that its mean and standard deviation must be
            restored after bias field and point spread.
    """

    curve_x: Tensor
    curve_y: Tensor
    bounds: Tensor
    bias_field: Tensor
    point_spread: Tensor
    noise_sd: Tensor
    noise_correlation: Tensor
    noise_seed: Tensor
    keeps_moments: Tensor


def draw_acquisition(
    generator: torch.Generator,
    settings: AcquisitionSettings,
    quantiles: Tensor,
    target_quantiles: Tensor,
    dim: int,
    scheme: Sequence[str],
    count: int,
) -> AcquisitionParameters:
    """Draw parameters of random acquisitions of one case; each of the four effects has ``settings.probability``.

    The result corresponds to the new image after nnU-Net's own preprocessing (method 6.9); see `draw_transfer_curve`
    for each scheme.

    Args:
        generator: random generator on the CPU; the number of draws does not depend on their outcome.
        settings: ranges of the effects.
        quantiles: (C, Q) the case's :func:`~nnunet_cfcl.counterfactual.acquisition.quantiles.intensity_quantiles`.
        target_quantiles: (n, C, Q) quantiles of n other cases, the targets of the intensity matching.
        dim: number of spatial axes, 2 or 3.
        scheme: nnU-Net's name of the normalisation of each channel, e.g. ``"ZScoreNormalization"``.
        count: number n of acquisitions.

    Returns:
        n acquisitions, finite also for constant images.

    Raises:
        ValueError: inconsistent shapes.
    """
    channels = quantiles.shape[0]
    if target_quantiles.shape != (count, *quantiles.shape) or len(scheme) != channels:
        raise ValueError(f"expected target quantiles {(count, *quantiles.shape)} and {channels} schemes, "
                         f"found {tuple(target_quantiles.shape)} and {len(scheme)}")
    uniform = torch.rand(count, 9, generator=generator)
    on = (uniform[:, :4] < settings.probability).float()
    between = uniform[:, 4:]
    strength = on[:, 0] * _scaled(between[:, 0], settings.matching)
    log_gamma = on[:, 0] * _scaled(between[:, 1], (math.log(settings.gamma[0]), math.log(settings.gamma[1])))
    noise_level = on[:, 1] * _scaled(between[:, 2], settings.noise_level)
    curve = draw_transfer_curve(quantiles, target_quantiles, strength, log_gamma.exp(), noise_level, scheme)
    return AcquisitionParameters(
        curve_x=curve.x,
        curve_y=curve.y,
        bounds=curve.bounds,
        bias_field=draw_log_bias_field(generator, on[:, 2], settings.bias_field, dim),
        point_spread=on[:, 3] * _scaled(between[:, 3], settings.point_spread),
        noise_sd=curve.noise_sd,
        noise_correlation=on[:, 1] * _scaled(between[:, 4], settings.noise_correlation),
        noise_seed=torch.randint(0, 2**62, (count,), generator=generator),
        keeps_moments=torch.tensor([name == "ZScoreNormalization" for name in scheme]).expand(count, -1),
    )


def _scaled(uniform: Tensor, interval: tuple[float, float]) -> Tensor:
    return interval[0] + (interval[1] - interval[0]) * uniform


def apply_acquisition(
    images: Tensor, parameters: AcquisitionParameters, spacing: Sequence[float] | Tensor, inside: Tensor | None = None
) -> Tensor:
    """Simulate images under other acquisitions.

    Pure: the same parameters on the same device give the same result, in a batch or one by one. With every effect off
    an image is returned exactly. Under z-scoring a counterfactual has the mean and standard deviation that its own
    normalisation would have given it (method 6.9): the curve and the noise account for them by the case's quantiles;
    after bias field and point spread they are restored with the crop's own moments as an estimate of the case's.

    Args:
        images: (N, C, *S) preprocessed intensities, D = 2 or 3 spatial axes.
        parameters: parameters with leading dimension N, on any device.
        spacing: (D,) voxel spacing in mm, array-axis order; sigmas in in-plane voxels are isotropic in mm.
        inside: (N, 1, *S) bool, False where nnU-Net's masked z-scoring leaves zeros (segmentation < 0): these voxels
            keep their intensity. None: all inside.

    Returns:
        (N, C, *S), dtype and device of ``images``.
    """
    # autocast would compute the matrix products of bias field and blur in half precision
    with torch.autocast(images.device.type, enabled=False):
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        acquired = _acquired(wide, parameters, _sigma_per_axis(spacing, images), inside).to(images.dtype)
    return acquired if inside is None else torch.where(inside, acquired, images)


def _acquired(
    images: Tensor, parameters: AcquisitionParameters, axis_scale: Tensor, inside: Tensor | None
) -> Tensor:
    seeds = parameters.noise_seed.tolist()
    p = AcquisitionParameters(*(field.to(images.device, non_blocking=True) for field in parameters))
    signal, floor = images.flatten(2), p.curve_x[:, :, :1]
    gain = torch.expm1(log_bias_field(p.bias_field, images.shape[2:])).flatten(1).unsqueeze(1)
    biased = (signal + (signal - floor) * gain).view_as(images)
    blurred = gaussian_blur(biased, p.point_spread[:, None] * axis_scale)
    altered = p.keeps_moments & (blurred != images).flatten(2).any(-1)
    standardised = _with_moments_of(images.flatten(2), blurred.flatten(2), inside).view_as(images)
    signal_seen = torch.where(altered.view(*altered.shape, *[1] * (images.ndim - 2)), standardised, blurred)
    mapped = apply_transfer_curve(signal_seen, p.curve_x, p.curve_y)
    noise = gaussian_blur(_white_noise(images, seeds), p.noise_correlation[:, None] * axis_scale, norm=2)
    noisy = mapped.flatten(2) + noise.flatten(2) * p.noise_sd.unsqueeze(2)
    # a voxel outside of the bounds keeps its intensity, so that no effect means no change
    low, high = p.bounds.unsqueeze(2).unbind(-1)
    return noisy.clamp(torch.minimum(low, signal), torch.maximum(high, signal)).view_as(images)


def _with_moments_of(reference: Tensor, changed: Tensor, inside: Tensor | None) -> Tensor:
    """Scale and shift ``changed`` (N, C, M) to ``reference``'s mean and standard deviation over ``inside``."""
    weight = torch.ones_like(reference[:, :1]) if inside is None else inside.flatten(2).to(reference.dtype)
    total = weight.sum(-1, keepdim=True).clamp_min(1)
    means = [(x * weight).sum(-1, keepdim=True) / total for x in (reference, changed)]
    deviations = [((x - m).square() * weight).sum(-1, keepdim=True).div(total).sqrt()
                  for x, m in zip((reference, changed), means, strict=True)]
    # crops that are constant, or constant after blurring, are only shifted
    scale = torch.where(deviations[1] > 1e-3 * deviations[0], deviations[0] / deviations[1].clamp_min(1e-12), 1.0)
    return (changed - means[1]) * scale + means[0]


def _sigma_per_axis(spacing: Sequence[float] | Tensor, images: Tensor) -> Tensor:
    """Voxels of each axis (D,) per in-plane voxel (the smallest spacing)."""
    mm = torch.as_tensor(spacing, dtype=torch.float32)
    if mm.shape != (images.ndim - 2,):
        raise ValueError(f"spacing must have {images.ndim - 2} values for images {tuple(images.shape)}, "
                         f"found {mm.tolist()}")
    return (mm.min() / mm).to(images.device)


def _white_noise(images: Tensor, seeds: list[int]) -> Tensor:
    """Standard normal noise (N, C, *S), every image with its own seed."""
    noise = torch.empty_like(images)
    generator = torch.Generator(device=images.device)
    for image_noise, seed in zip(noise, seeds, strict=True):
        image_noise.normal_(generator=generator.manual_seed(seed))
    return noise
