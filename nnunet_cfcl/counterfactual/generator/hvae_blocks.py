"""What the HVAE's encoder and decoder are built of, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    # for annotations alone: the model imports its blocks
    from nnunet_cfcl.counterfactual.generator.hvae import HVAESizes, Resolution


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-convolution to the inner width, GroupNorm-SiLU-dropout-convolution that starts as zero; a 1x1
    convolution beside them where the widths differ.

    Args:
        sizes: of the model.
        width: channels in.
        out: channels out.
        base: inner width times ``sizes.bottleneck``.
        kernel: 1 or 3 voxels.
    """

    def __init__(self, sizes: HVAESizes, width: int, out: int, base: int, kernel: int = 3) -> None:
        super().__init__()
        conv, _ = layers_of(sizes)
        inner = max(1, base // sizes.bottleneck)
        last = zeroed(conv(inner, out, kernel, padding=kernel // 2))
        self.layers = nn.Sequential(
            group_norm(width), nn.SiLU(), conv(width, inner, kernel, padding=kernel // 2),
            group_norm(inner), nn.SiLU(), nn.Dropout(sizes.dropout), last)
        self.skip = nn.Identity() if width == out else conv(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, *S) -> (B, out, *S)."""
        return cast(Tensor, self.skip(x) + self.layers(x))


class BiasMap(nn.Module):
    """Adds a learned map (width, *shape): where in the picture one is."""

    def __init__(self, resolution: Resolution) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(resolution.width, *resolution.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, *shape)."""
        return x + self.map


def layers_of(sizes: HVAESizes) -> tuple[Callable[..., nn.Module], Callable[..., Tensor]]:
    """Convolution and average pooling of the model's dimension."""
    dim = len(sizes.resolutions[0].shape)
    return (nn.Conv2d, nn.functional.avg_pool2d) if dim == 2 else (nn.Conv3d, nn.functional.avg_pool3d)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, giving zero until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels: on a single voxel smaller ones would hardly leave anything."""
    groups = math.gcd(channels, 32)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)
