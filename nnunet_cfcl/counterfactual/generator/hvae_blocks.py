"""Building blocks of the HVAE's encoder and decoder, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution


class ResidualBlock(nn.Module):
    """Bottleneck residual block: GroupNorm-SiLU-convolution, then GroupNorm-SiLU-dropout-convolution initialised to 0.

    The skip connection is a 1x1 convolution where the widths differ, else the identity.

    Args:
        sizes: sizes of the model.
        width: number of input channels.
        out: number of output channels.
        base: inner width times ``sizes.bottleneck``.
        kernel: kernel size, 1 or 3 voxels.
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
        """Map (B, width, *S) to (B, out, *S)."""
        return cast(Tensor, self.skip(x) + self.layers(x))


class BiasMap(nn.Module):
    """Add a learned map (width, *shape), which encodes the position in the image."""

    def __init__(self, resolution: Resolution) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(resolution.width, *resolution.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Add the map to features (B, width, *shape)."""
        return x + self.map


def layers_of(sizes: HVAESizes) -> tuple[Callable[..., nn.Module], Callable[..., Tensor]]:
    """Convolution and average pooling for the model's number of spatial axes."""
    dim = len(sizes.resolutions[0].shape)
    return (nn.Conv2d, nn.functional.avg_pool2d) if dim == 2 else (nn.Conv3d, nn.functional.avg_pool3d)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels; smaller groups would erase a single voxel's features."""
    groups = math.gcd(channels, 32)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return nn.GroupNorm(groups, channels)
