"""Bias field: smooth multiplicative intensity variation, as caused by coils and X-ray tubes."""

from __future__ import annotations

import torch
from torch import Tensor

CONTROL_POINTS = 4


def draw_log_bias_field(generator: torch.Generator, on: Tensor, amplitude: tuple[float, float], dim: int) -> Tensor:
    """Draw control points (n, 4, ..., 4) of n random log bias fields.

    The log field is a tensor product of Bernstein polynomials of degree 3, has mean 0, and its largest absolute value
    over an image of 17 voxels per axis is uniform in ``amplitude`` (slightly more on larger images, whose outermost
    voxel centres lie nearer to the border, where the field is strongest).

    Args:
        generator: random generator on the CPU.
        on: (n,) 1 for a field, 0 for none (all control points 0).
        amplitude: range of the largest absolute value of the log field.
        dim: D, number of spatial axes.
    """
    count = on.shape[0]
    control = torch.randn(count, *[CONTROL_POINTS] * dim, generator=generator)
    target = amplitude[0] + (amplitude[1] - amplitude[0]) * torch.rand(count, generator=generator)
    axes = tuple(range(1, dim + 1))
    # all Bernstein polynomials have the same integral: control points with mean 0 give a field with mean 0
    control = control - control.mean(axes, keepdim=True)
    peak = log_bias_field(control, (17,) * dim).abs().amax(axes).clamp_min(1e-6)
    return control * (on * target / peak).view(-1, *[1] * dim)


def log_bias_field(control: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Evaluate the log field with control points (n, 4, ..., 4) at the voxel centres; (n, *shape)."""
    field = control
    for length in shape:
        basis = _bernstein(length, field)
        # each contraction moves its axis to the end; after all axes the order is restored
        field = torch.tensordot(field, basis, dims=([1], [1]))
    return field


def _bernstein(length: int, like: Tensor) -> Tensor:
    """Cubic Bernstein polynomials (length, 4) at pixel centres (i + 0.5) / length."""
    t = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
    return torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
