"""Grey images, colours laid over them, and both as PNG files, pixel for pixel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nnunet_cfcl.files.atomic import replace_atomically

#: Percentiles of an image that become black and white.
WINDOW = (0.5, 99.5)
#: Values that percentiles are computed of; all values of a CT would take longer than the picture.
SAMPLES = 1_000_000


def grey_window(image: NDArray[Any]) -> tuple[float, float]:
    """The values that become black and white: the outermost half percents, or the extremes where those are equal.

    Args:
        image: (*S), numbers of any kind; values that are not finite do not count. Of a large image every n-th row
            and every n-th value of it is used.

    Returns:
        low < high, also of a constant or an empty image.
    """
    step = max(1, round((image.size / SAMPLES) ** (1 / max(image.ndim, 1))))
    values = np.asarray(image[(slice(None, None, step),) * image.ndim], dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, WINDOW))
    if low == high:
        # a few bright voxels on a constant background
        low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low, low + 1.0)


def grey(image: NDArray[Any], window: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """An image as shades of grey.

    Args:
        image: (*S), numbers of any kind. NaN becomes black.
        window: the values that become 0 and 255; None is `grey_window` of the image.

    Returns:
        (*S) uint8; 0 everywhere for a constant image.
    """
    low, high = grey_window(image) if window is None else window
    scaled = np.subtract(image, low, dtype=np.float32)
    scaled *= 255 / (high - low)
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(scaled, 0, 255, out=scaled).round(out=scaled).astype(np.uint8)


def overlay(
    background: NDArray[np.uint8], colors: NDArray[np.uint8], alpha: float = 0.5,
    inside: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Colours over a grey image: alpha times the colour plus 1 - alpha times the grey.

    Args:
        background: (*S) uint8.
        colors: (*S, 3) uint8.
        alpha: 0 (grey alone) to 1 (colour alone), in steps of 1 / 256.
        inside: (*S), where there is colour; None is everywhere. Elsewhere the grey image stays as it is.

    Returns:
        (*S, 3) uint8.

    Raises:
        ValueError: shapes that do not fit, alpha outside [0, 1].
    """
    if colors.shape != (*background.shape, 3) or (inside is not None and inside.shape != background.shape):
        shapes = (background.shape, colors.shape, None if inside is None else inside.shape)
        raise ValueError(f"expected background (*S), colours (*S, 3) and inside (*S), found {shapes}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, found {alpha}")
    weight = round(256 * alpha)
    # 16 bit integers hold 255 * 256 and need half the memory of floats
    mixed = colors.astype(np.uint16)
    mixed *= weight
    mixed += (background.astype(np.uint16) * (256 - weight) + 128)[..., None]
    mixed >>= 8
    blended = mixed.astype(np.uint8)
    if inside is not None:
        np.copyto(blended, background[..., None], where=~inside[..., None])
    return blended


def grey_background(
    colors: NDArray[np.uint8], image: NDArray[Any], window: tuple[float, float] | None = None,
    full: float = 0.25, floor: float = 0.0,
) -> NDArray[np.uint8]:
    """Colours dimmed where the image is dark, so that air is not the loudest part of a picture.

    With t the intensity in the window (0 at its lower end, 1 at ``full`` of its width, cut off beyond), every colour is
    multiplied by floor + (1 - floor) * (3 t^2 - 2 t^3): its value changes, hue and saturation stay. Dark tissue, such
    as lung in an X-ray or fluid in T1, is dimmed, too: an option, not a default.

    Args:
        colors: (*S, 3) uint8.
        image: (*S), numbers of any kind.
        window: the values from black to white; None is `grey_window` of the image.
        full: from which part of the window on, in (0, 1], colours are as they were.
        floor: 0 to 1, what is left of colours on black.

    Returns:
        (*S, 3) uint8.

    Raises:
        ValueError: shapes that do not fit, or numbers out of range.
    """
    if colors.shape != (*image.shape, 3):
        raise ValueError(f"expected colours (*S, 3) and an image (*S), found {colors.shape} and {image.shape}")
    if not (0 < full <= 1 and 0 <= floor <= 1):
        raise ValueError(f"expected 0 < full <= 1 and 0 <= floor <= 1, found {full} and {floor}")
    # the 256 shades are enough to look the factor up
    step = np.clip(np.arange(256) / (255 * full), 0, 1)
    factor = np.round(256 * (floor + (1 - floor) * step**2 * (3 - 2 * step))).astype(np.uint16)
    dimmed = colors.astype(np.uint16)
    dimmed *= factor[grey(image, window)][..., None]
    dimmed += 128
    dimmed >>= 8
    return dimmed.astype(np.uint8)


def write_png(file: str | os.PathLike[str], picture: NDArray[np.uint8]) -> None:
    """Write a picture, one pixel per value, nothing around it; atomically.

    Args:
        file: path of the picture.
        picture: (Y, X) grey, (Y, X, 3) RGB or (Y, X, 4) RGBA, uint8, first row on top.

    Raises:
        ValueError: another shape or data type.
    """
    if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
        raise ValueError(f"expected (Y, X), (Y, X, 3) or (Y, X, 4) uint8, found {picture.shape} {picture.dtype}")
    made = Image.fromarray(np.ascontiguousarray(picture))
    replace_atomically(file, lambda temporary: made.save(temporary, format="PNG"))
