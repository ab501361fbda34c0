"""Transfer curve of a scanner: a monotone piecewise-linear map of intensities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KNOTS = 65


class TransferCurve(NamedTuple):
    """Transfer curves of n acquisitions and their noise level; shapes as in ``AcquisitionParameters``."""

    x: Tensor
    y: Tensor
    bounds: Tensor
    noise_sd: Tensor


def draw_transfer_curve(
    quantiles: Tensor, targets: Tensor, strength: Tensor, gamma: Tensor, noise_level: Tensor, scheme: Sequence[str]
) -> TransferCurve:
    """Compute curves y = normalised(gamma curve(partial quantile matching(x))) on the robust range of a case.

    The last step follows nnU-Net's preprocessing of the new image. ``ZScoreNormalization``: curve and noise are
    rescaled together so that mean and standard deviation of the table do not change; ``RescaleTo01Normalization``: the
    ends of the range do not change, values are clipped to [0, 1]; ``RGBTo01Normalization``: values are clipped to
    [0, 1]; ``CTNormalization``: values are clipped to the range of the table; ``NoNormalization`` and unknown schemes:
    no change.

    Args:
        quantiles: (C, Q) quantile table of the case.
        targets: (n, C, Q) quantile tables of the target cases.
        strength: (n,) strength of the matching from 0 (none) to 1 (the target's distribution).
        gamma: (n,) exponent on the range rescaled to [0, 1].
        noise_level: (n,) standard deviation of the noise relative to the range.
        scheme: nnU-Net's normalisation scheme of each of the C channels.

    Returns:
        n curves; with strength 0, gamma 1 and no noise y equals x exactly.
    """
    n, channels = targets.shape[:2]
    table = quantiles.float().expand(n, -1, -1)
    low, width = table[..., :1], (table[..., -1:] - table[..., :1])
    flat = width <= 1e-6 * (1 + table.abs().amax(-1, keepdim=True))
    # on a constant image the width grows with its value, so that knots differ in float32
    x = low + torch.where(flat, 1 + low.abs(), width) * torch.linspace(0, 1, KNOTS)
    y = _gamma_curve(_matched(x, table, targets.float(), strength), gamma)
    y = torch.where(flat | ((strength == 0) & (gamma == 1)).view(-1, 1, 1), x, y)
    noise_sd = noise_level[:, None] * torch.where(flat, 0, y[..., -1:] - y[..., :1]).squeeze(-1)
    bounds = torch.tensor([-torch.inf, torch.inf]).repeat(n, channels, 1)
    for c, name in enumerate(scheme):
        y[:, c], noise_sd[:, c] = _renormalised(name, table[:, c], x[:, c], y[:, c], noise_sd[:, c])
        if name == "CTNormalization":
            bounds[:, c] = table[:, c][:, [0, -1]]
        elif name in ("RescaleTo01Normalization", "RGBTo01Normalization"):
            bounds[:, c] = torch.tensor([0.0, 1.0])
    return TransferCurve(x, y, bounds, noise_sd)


def _matched(x: Tensor, table: Tensor, targets: Tensor, strength: Tensor) -> Tensor:
    """Move knots towards the target's intensity of the same quantile, by the fraction ``strength``."""
    aim = torch.lerp(table, targets, strength.view(-1, 1, 1))
    # quantiles of (nearly) the same intensity, e.g. of air, share the mean of their targets
    spacing = x[..., 1:2] - x[..., :1]
    same = (table.unsqueeze(-1) - table.unsqueeze(-2)).abs() <= 0.5 * spacing.unsqueeze(-1)
    aim = (same * aim.unsqueeze(-2)).sum(-1) / same.sum(-1)
    return _interpolate(x, table, aim)


def _interpolate(x: Tensor, knots_x: Tensor, knots_y: Tensor) -> Tensor:
    """Interpolate linearly at x (..., K) between ascending knots (..., Q), constant outside; ties are allowed."""
    right = torch.searchsorted(knots_x.contiguous(), x.contiguous()).clamp(1, knots_x.shape[-1] - 1)
    x0, x1 = knots_x.gather(-1, right - 1), knots_x.gather(-1, right)
    y0, y1 = knots_y.gather(-1, right - 1), knots_y.gather(-1, right)
    share = ((x - x0) / (x1 - x0).clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return torch.lerp(y0, y1, share)


def _gamma_curve(y: Tensor, gamma: Tensor) -> Tensor:
    low, width = y[..., :1], y[..., -1:] - y[..., :1]
    share = ((y - low) / width.clamp_min(torch.finfo(y.dtype).tiny)).clamp(0, 1)
    return low + width * share ** gamma.view(-1, 1, 1)


def _renormalised(name: str, table: Tensor, x: Tensor, y: Tensor, noise_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Apply nnU-Net's normalisation of the new image to knots (n, K) and noise (n,) of one channel."""
    changed = (y != x).any(-1) | (noise_sd > 0)
    if name == "ZScoreNormalization":
        mapped = _interpolate(table, x, y)
        std = (mapped.var(-1, correction=0) + noise_sd**2).sqrt()
        scale = table.std(-1, correction=0) / std
        moved = table.mean(-1, keepdim=True) + (y - mapped.mean(-1, keepdim=True)) * scale[:, None]
    elif name == "RescaleTo01Normalization":
        scale = (x[:, -1] - x[:, 0]) / (y[:, -1] - y[:, 0])
        moved = x[:, :1] + (y - y[:, :1]) * scale[:, None]
    else:
        return y, noise_sd
    usable = changed & scale.isfinite()
    return torch.where(usable[:, None], moved, x), torch.where(usable, noise_sd * scale, 0)


def apply_transfer_curve(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Map intensities by piecewise-linear curves, extrapolated with the curve's mean slope.

    The slopes at the ends would amplify outliers (a gamma of 0.5 rises steeply at 0).

    Args:
        images: (N, C, *S).
        x: (N, C, K) evenly spaced, ascending knots.
        y: (N, C, K) intensities at the knots.

    Returns:
        (N, C, *S); exactly ``images`` where y equals x.
    """
    values = images.flatten(2)
    last = x.shape[-1] - 1
    # interpolate the displacement instead of y: where it is 0, no rounding error is added
    shift = y - x
    slope = shift.diff(dim=-1)
    mean_slope = (shift[..., -1:] - shift[..., :1]) / last
    position = (values - x[..., :1]) * (last / (x[..., -1:] - x[..., :1]))
    inner = position.clamp(0, last)
    segment = inner.to(torch.int64).clamp_max_(last - 1)
    moved = shift.gather(-1, segment) + slope.gather(-1, segment) * (inner - segment)
    return (values + moved + mean_slope * (position - inner)).view_as(images)
