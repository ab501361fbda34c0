"""Building blocks of the phantom: pixel coordinates, smooth random fields and correlated noise.

All functions are deterministic; random numbers are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

Array = NDArray[np.floating]


def pixel_centres(shape: Sequence[int]) -> Array:
    """Return the coordinates of all pixel centres.

    Args:
        shape: Image size ([z,] y, x).

    Returns:
        (D, *shape) float64; every axis runs over (-1, 1), pixel i lying at (2 i + 1) / n - 1.
    """
    axes = [(2.0 * np.arange(n) + 1.0) / n - 1.0 for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _cosine_weights(orders: int, dim: int) -> Array:
    """Return amplitudes (orders,) * dim that fall with frequency, have no constant term and give unit mean square."""
    k = np.stack(np.meshgrid(*[np.arange(orders)] * dim, indexing="ij")).astype(float)
    weights = 1.0 / (1.0 + (k**2).sum(0))
    weights.flat[0] = 0.0
    # a cosine has mean square 1/2 along each axis on which it is not constant
    mean_square = np.prod(np.where(k > 0, 0.5, 1.0), axis=0)
    return np.asarray(weights / np.sqrt((weights**2 * mean_square).sum()))


def cosine_field(coefficients: Array, shape: Sequence[int]) -> Array:
    """Evaluate a smooth random field, the same function at any resolution.

    The field is sum_k w_k c_k prod_a cos(pi k_a (p_a + 1) / 2), with w_k falling as 1 / (1 + |k|^2) and w_0 = 0.

    Args:
        coefficients: (K,) * D standard normal numbers c_k, lowest frequency first.
        shape: Image size, D axes.

    Returns:
        (*shape) float64; expected mean square 1.
    """
    field: Array = coefficients * _cosine_weights(coefficients.shape[0], coefficients.ndim)
    for n in shape:
        position = (np.arange(n) + 0.5) / n
        basis = np.cos(np.pi * np.arange(coefficients.shape[0])[:, None] * position)
        # contracts the leading axis and appends the spatial one, so after D turns the order is kept
        field = np.tensordot(field, basis, axes=(0, 0))
    return field


def blur(image: Array, sigma: Sequence[float]) -> Array:
    """Convolve with a Gaussian, edges repeated.

    Args:
        image: (*shape).
        sigma: Standard deviation per axis in pixels; 0 leaves the axis unchanged.
    """
    return np.asarray(gaussian_filter(image, sigma, mode="nearest"))


def correlated_noise(white: Array, sigma: Sequence[float]) -> Array:
    """Give a white field a spatial correlation and keep its variance.

    Args:
        white: (*shape) independent standard normal numbers.
        sigma: Standard deviation of the Gaussian filter per axis in pixels; all 0 returns `white` itself.

    Returns:
        (*shape) with expected variance 1 at every pixel (the filter wraps around, so borders are no exception).
    """
    if not any(sigma):
        return white
    gain = 1.0
    for n, s in zip(white.shape, sigma, strict=True):
        impulse = np.zeros(n)
        impulse[0] = 1.0
        gain *= float(np.linalg.norm(gaussian_filter1d(impulse, s, mode="wrap"))) if s > 0 else 1.0
    return np.asarray(gaussian_filter(white, sigma, mode="wrap")) / gain


def smoothstep(value: Array) -> Array:
    """Return the cubic ramp 3 t^2 - 2 t^3 of `value` clipped to [0, 1]."""
    t = np.clip(value, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def freeze(array: Array) -> Array:
    """Set an array read-only and return it: exogenous noise is drawn once and never changed."""
    array.setflags(write=False)
    return array
