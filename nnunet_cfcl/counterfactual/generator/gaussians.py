"""Element-wise densities and divergences of diagonal Gaussians, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kl(loc: Tensor, log_scale: Tensor, prior_loc: Tensor, prior_log_scale: Tensor) -> Tensor:
    """KL(q || p) of q = N(loc, exp(log_scale)^2) and p likewise; all tensors and the result have one shape."""
    variance_ratio = torch.exp(2 * (log_scale - prior_log_scale))
    shift = ((loc - prior_loc) * torch.exp(-prior_log_scale)) ** 2
    return prior_log_scale - log_scale + (variance_ratio + shift - 1) / 2


def gaussian_log_density(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """log N(x; loc, exp(log_scale)^2), the likelihood of continuous intensities."""
    return -(((x - loc) * torch.exp(-log_scale)) ** 2) / 2 - log_scale - math.log(2 * math.pi) / 2


def discretised_gaussian_log_probability(
    x: Tensor, loc: Tensor, log_scale: Tensor, bin_width: float, low: float, high: float
) -> Tensor:
    """Log probability of the bin around x under a Gaussian; the first and the last bin extend to infinity.

    The likelihood of 8-bit images (Ribeiro et al. 2023, arXiv 2306.15764; Salimans et al. 2017, arXiv 1701.05517, with
    a logistic). The probabilities of all bins add up to 1; far from the mean they stay positive, with useful gradients.

    Args:
        x: bin centres, from ``low`` to ``high``.
        loc, log_scale: mean and log standard deviation of the Gaussian, same shape as ``x``.
        bin_width: distance between neighbouring bin centres.
        low, high: the first and the last bin centre.
    """
    scale = torch.exp(-log_scale)
    upper, lower = (x - loc + bin_width / 2) * scale, (x - loc - bin_width / 2) * scale
    # differences of the normal CDF are accurate in its lower tail only: mirror values above the mean
    above = upper + lower > 0
    upper, lower = torch.where(above, -lower, upper), torch.where(above, -upper, lower)
    larger = torch.special.log_ndtr(upper)
    inner = larger + _log_one_minus_exp(torch.special.log_ndtr(lower) - larger)
    first = torch.special.log_ndtr((x - loc + bin_width / 2) * scale)
    last = torch.special.log_ndtr(-(x - loc - bin_width / 2) * scale)
    return torch.where(x <= low + bin_width / 4, first, torch.where(x >= high - bin_width / 4, last, inner))


def _log_one_minus_exp(negative: Tensor) -> Tensor:
    """log(1 - exp(y)) for y < 0, accurate at both ends (Mächler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    negative = negative.clamp(max=-torch.finfo(negative.dtype).tiny)
    near = negative > -math.log(2)
    # torch.where differentiates both branches: each gets arguments with a finite gradient
    small = torch.log(-torch.expm1(torch.where(near, negative, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, negative)))
    return torch.where(near, small, large)
