"""Colours of the unit disc: hue is the angle, saturation the radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Palette = Literal["hsv", "oklch"]

#: Points coloured at once, so that their temporaries fit into the cache.
BLOCK = 2**18
#: The lightness of OKLCh at which the largest chroma that all hues have within sRGB is largest, and that chroma: below
#: it magenta, above it blue and violet end earlier. Found by bisecting the chroma over 7200 hues at steps of 0.0005.
LIGHTNESS, CHROMA = 0.75, 0.1275

# Ottosson 2020, "A perceptual color space for image processing": a and b of OKLab -> cube roots of cone responses
_TO_CONES = ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
# cone responses -> linear sRGB
_TO_LINEAR = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def colors(disc: Tensor, palette: Palette) -> Tensor:
    """Colours of places in the unit disc.

    Args:
        disc: (..., 2), x to the right and y up, of any float type, on any device. The angle is counted from x towards
            y; a radius above 1 counts as 1.
        palette: "hsv": value 1 and a white centre, as in the paper; angle 0 is red, 120 degrees green. "oklch": the
            same lightness everywhere (OKLCh 0.75) and a grey centre, so that no hue outshines others.

    Returns:
        (..., 3) uint8, sRGB; black where a coordinate is NaN.

    Raises:
        ValueError: another shape, or an unknown palette.
    """
    if disc.ndim < 1 or disc.shape[-1] != 2:
        raise ValueError(f"expected coordinates (..., 2), found {tuple(disc.shape)}")
    if palette not in _PALETTES:
        raise ValueError(f"unknown palette {palette!r}, expected one of {', '.join(get_args(Palette))}")
    paint = _PALETTES[palette]
    x, y = disc[..., 0].reshape(-1), disc[..., 1].reshape(-1)
    found = torch.empty((len(x), 3), dtype=torch.uint8, device=disc.device)
    for start in range(0, len(x), BLOCK):
        piece = slice(start, start + BLOCK)
        across, up = x[piece].float(), y[piece].float()
        radius = torch.hypot(across, up)
        for channel, value in enumerate(paint(across, up, radius)):
            # half a step more turns cutting off into rounding
            found[piece, channel] = value.mul_(255).add_(0.5).nan_to_num_(0).to(torch.uint8)
    return found.view(*disc.shape[:-1], 3)


def color_wheel(size: int, palette: Palette) -> Tensor:
    """Draw the disc as a picture, y up.

    Args:
        size: side in pixels, at least 1.

    Returns:
        (size, size, 4) RGBA uint8, transparent outside of the disc.
    """
    steps = (torch.arange(size) + 0.5) * 2 / size - 1
    disc = torch.stack(torch.meshgrid(steps, -steps, indexing="xy"), -1)
    # the edge fades within one pixel
    cover = ((1 - torch.linalg.vector_norm(disc, dim=-1)) * size / 2 + 0.5).clamp_(0, 1)
    alpha = (255 * cover + 0.5).to(torch.uint8)
    return torch.cat([colors(disc, palette), alpha[..., None]], -1)


def _hsv(x: Tensor, y: Tensor, radius: Tensor) -> list[Tensor]:
    """Channels of hue = angle, saturation = radius, value 1 (Smith 1978, "Color gamut transform pairs")."""
    hue, saturation = torch.atan2(y, x).mul_(3 / math.pi), radius.clamp_max(1)
    # 1 within 60 degrees of the channel's own hue, 0 beyond 120, straight between; angles in units of 60 degrees
    shares = [((hue - own).abs_() - 3).abs_().sub_(1).clamp_(0, 1) for own in (0, 2, -2)]
    return [share.sub_(1).mul_(saturation).add_(1) for share in shares]


def _oklch(x: Tensor, y: Tensor, radius: Tensor) -> list[Tensor]:
    """Channels of lightness `LIGHTNESS` and chroma `CHROMA` times the radius, at hue = angle."""
    scale = CHROMA / radius.clamp_min(1)
    a, b = x * scale, y * scale
    cones = [(LIGHTNESS + from_a * a).add_(b, alpha=from_b).pow_(3) for from_a, from_b in _TO_CONES]
    return [_encoded((row[0] * cones[0]).add_(cones[1], alpha=row[1]).add_(cones[2], alpha=row[2]))
            for row in _TO_LINEAR]


def _encoded(linear: Tensor) -> Tensor:
    """Linear light -> sRGB (IEC 61966-2-1); clips its argument to [0, 1] in place."""
    linear.clamp_(0, 1)
    # the straight start is the larger one below 0.0031308, the power from there on
    return torch.maximum(12.92 * linear.clamp_max(0.0031308), linear.pow(1 / 2.4).mul_(1.055).sub_(0.055))


_PALETTES: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {"hsv": _hsv, "oklch": _oklch}
