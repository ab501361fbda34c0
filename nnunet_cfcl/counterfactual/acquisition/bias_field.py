"""Smooth multiplicative intensity variation over the image, as coils and tubes cause it."""

from __future__ import annotations

import torch
from torch import Tensor

CONTROL_POINTS = 4


def draw_log_bias_field(generator: torch.Generator, on: Tensor, amplitude: tuple[float, float], dim: int) -> Tensor:
    """(n, 4, ..., 4) control points of n random log bias fields.

    The log field is a tensor product of Bernstein polynomials of degree 3, has mean 0, and its largest absolute value
    over an image of 17 voxels per axis is uniform in ``amplitude`` (a little more on larger images, whose outermost
    voxel centres lie nearer to the border, where the field is strongest).

    Args:
        generator: CPU generator.
        on: (n,) 1 for a field, 0 for none (all control points 0).
        amplitude: range of the largest absolute value of the log field.
        dim: D, number of grid axes.
    """
    count = on.shape[0]
    control = torch.randn(count, *[CONTROL_POINTS] * dim, generator=generator)
    wanted = amplitude[0] + (amplitude[1] - amplitude[0]) * torch.rand(count, generator=generator)
    axes = tuple(range(1, dim + 1))
    # Bernstein polynomials all have the same integral, so a mean of 0 of the control points is one of the field
    control = control - control.mean(axes, keepdim=True)
    peak = log_bias_field(control, (17,) * dim).abs().amax(axes).clamp_min(1e-6)
    return control * (on * wanted / peak).view(-1, *[1] * dim)


def log_bias_field(control: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """(n, *shape) values at the voxel centres of the log field with control points (n, 4, ..., 4)."""
    field = control
    for length in shape:
        basis = _bernstein(length, field)
        # the axis worked on moves to the end; after all of them the order is the old one
        field = torch.tensordot(field, basis, dims=([1], [1]))
    return field


def _bernstein(length: int, like: Tensor) -> Tensor:
    """(length, 4) cubic Bernstein polynomials at pixel centres (i + 0.5) / length."""
    t = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
    return torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
