"""Scanners: transfer curve, bias field, point spread, noise level and texture.

`apply_scanner` takes any scene in [0, 1], so that it applies to real volumes as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phantom.fields import Array, blur, correlated_noise, cosine_field, freeze, pixel_centres

BIAS_ORDERS = 3
"""Cosine orders per axis of the bias field."""


@dataclass(frozen=True)
class ScannerParameters:
    """Parameters of a scanner.

    Attributes:
        name: Value of the attribute `scanner`.
        curve: Nodes (scene intensity, image intensity) of the transfer curve; the first column rises from 0 to 1,
            both lie in [0, 1], between nodes the curve is monotone (piecewise cubic Hermite).
        exposure_std: Standard deviation of the log gain from patient to patient.
        bias_rms: Root mean square of the log bias field that differs from patient to patient.
        shading: Log gain at the front (y = -1), and its negative at the back: the bias common to all patients.
        psf_sigma: Standard deviation of the Gaussian point spread, mm.
        noise_level: Standard deviation of the noise, image units.
        noise_correlation: Standard deviation of the filter that correlates the noise, mm; 0 is white noise.

    Raises:
        UserError: If the curve or a standard deviation is out of range.
    """

    name: str
    curve: tuple[tuple[float, float], ...]
    exposure_std: float
    bias_rms: float
    shading: float
    psf_sigma: float
    noise_level: float
    noise_correlation: float

    def __post_init__(self) -> None:
        nodes = np.array(self.curve, float)
        rises = nodes.ndim == 2 and nodes.shape[1] == 2 and len(nodes) >= 2 and bool((np.diff(nodes[:, 0]) > 0).all())
        if not rises or nodes[0, 0] != 0 or nodes[-1, 0] != 1 or nodes.min() < 0 or nodes.max() > 1:
            raise UserError(
                f"the transfer curve of scanner {self.name!r} needs nodes (scene, image) within [0, 1] whose first "
                f"column rises from 0 to 1, found {self.curve}"
            )
        for key in ("exposure_std", "bias_rms", "psf_sigma", "noise_level", "noise_correlation"):
            if getattr(self, key) < 0:
                raise UserError(f"{key} of scanner {self.name!r} must not be negative, found {getattr(self, key)}")


SCANNER_A = ScannerParameters(
    name="A",
    curve=((0.0, 0.0), (0.5, 0.52), (1.0, 0.97)),
    exposure_std=0.03,
    bias_rms=0.03,
    shading=0.0,
    psf_sigma=0.55,
    noise_level=0.020,
    noise_correlation=0.0,
)
"""Nearly linear and sharp, with little white noise."""

SCANNER_B = ScannerParameters(
    name="B",
    curve=(
        (0.0, 0.02),
        (0.03, 0.05),
        (0.17, 0.58),
        (0.31, 0.46),
        (0.42, 0.34),
        (0.60, 0.84),
        (0.68, 0.74),
        (0.80, 0.92),
        (0.92, 0.82),
        (1.0, 0.80),
    ),
    exposure_std=0.03,
    bias_rms=0.08,
    shading=0.20,
    psf_sigma=0.95,
    noise_level=0.024,
    noise_correlation=0.7,
)
"""Lungs brighter than muscle, blood darker than the heart wall; shading, blur, stronger and coarser noise."""

SCANNERS: dict[str, ScannerParameters] = {"A": SCANNER_A, "B": SCANNER_B}


@dataclass(frozen=True)
class AcquisitionNoise:
    """Exogenous noise of the acquisition, shared by a patient's image on every scanner.

    Attributes:
        white: (*shape) standard normal field u; the scanner sets its level and texture.
        bias: (K, ..., K) standard normal cosine coefficients, K = `BIAS_ORDERS`.
        exposure: Standard normal number, clipped to +-2.
    """

    white: Array
    bias: Array
    exposure: float


def draw_acquisition_noise(rng: np.random.Generator, shape: Sequence[int]) -> AcquisitionNoise:
    """Draw the exogenous noise of one acquisition for an image of `shape`."""
    return AcquisitionNoise(
        white=freeze(rng.standard_normal(tuple(shape))),
        bias=freeze(rng.standard_normal((BIAS_ORDERS,) * len(shape))),
        exposure=float(np.clip(rng.standard_normal(), -2, 2)),
    )


def transfer(scene: Array, parameters: ScannerParameters) -> Array:
    """Apply the scanner's transfer curve to scene intensities, clipped to [0, 1]."""
    nodes = np.array(parameters.curve, float)
    return np.asarray(PchipInterpolator(nodes[:, 0], nodes[:, 1])(np.clip(scene, 0.0, 1.0)))


def log_gain(parameters: ScannerParameters, noise: AcquisitionNoise) -> Array:
    """Return the logarithm of exposure times bias field, (*shape)."""
    shape = noise.white.shape
    field = parameters.bias_rms * cosine_field(noise.bias, shape)
    return field - parameters.shading * pixel_centres(shape)[-2] + parameters.exposure_std * noise.exposure


def apply_scanner(
    scene: Array, parameters: ScannerParameters, noise: AcquisitionNoise, spacing: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Image a scene: x = clip(PSF * (exp(gain) curve(scene)) + level * texture(u), 0, 1).

    Args:
        scene: (*shape), clipped to [0, 1]. For real volumes rescale between robust percentiles first.
        parameters: The scanner.
        noise: The acquisition's exogenous noise, drawn for this shape.
        spacing: Pixel size in mm, array-axis order; None: 1 mm.

    Returns:
        (*shape) float32 in [0, 1].

    Raises:
        UserError: If the shapes of scene, noise and spacing disagree.
    """
    spacing = tuple(spacing) if spacing is not None else (1.0,) * scene.ndim
    if scene.shape != noise.white.shape or len(spacing) != scene.ndim:
        raise UserError(
            f"scene {scene.shape}, acquisition noise {noise.white.shape} and spacing {spacing} must have the same axes",
            "draw the noise for the scene's shape and give one spacing per axis",
        )
    # tissue contrast arises before the point spread: blurring first would draw dark rims where the curve turns
    exposed = np.exp(log_gain(parameters, noise)) * transfer(scene, parameters)
    blurred = blur(exposed, [parameters.psf_sigma / s for s in spacing])
    grain = correlated_noise(noise.white, [parameters.noise_correlation / s for s in spacing])
    return np.clip(blurred + parameters.noise_level * grain, 0.0, 1.0).astype(np.float32)
