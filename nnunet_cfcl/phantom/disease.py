"""Disease of the phantom: a pleural effusion, fluid that fills the back of one lung and hides its border."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phantom.anatomy import Anatomy
from nnunet_cfcl.phantom.fields import Array, pixel_centres, smoothstep

DISEASES = ("none", "effusion")

FRACTION = (0.30, 0.50)
"""Range of the lung volume that fluid fills."""
TILT = 0.25
"""Standard deviation of the fluid surface's slope towards the side."""
MENISCUS = (0.5, 1.5)
"""Range of the surface's curvature: fluid climbs the walls, coordinate units of height per squared offset."""
SURFACE_WIDTH = 0.08
"""Width of the blurred fluid surface, coordinate units."""
OPACITY = 0.95
"""Share of the lung's intensity that fluid replaces."""
INTENSITY_STD = 0.012
"""Standard deviation of the difference between the intensities of fluid and muscle, which it resembles."""


@dataclass(frozen=True)
class DiseaseNoise:
    """Exogenous noise of the disease, drawn for healthy patients too, whose effusion it describes.

    Attributes:
        side: 0 for the right lung, 1 for the left.
        fraction: Share of that lung below the fluid's surface.
        tilt: Slope of the surface along x.
        meniscus: Curvature of the surface along x.
        intensity: Fluid minus muscle, scene units.
    """

    side: int
    fraction: float
    tilt: float
    meniscus: float
    intensity: float


def draw_disease_noise(rng: np.random.Generator) -> DiseaseNoise:
    """Draw the exogenous noise of one patient's disease."""
    return DiseaseNoise(
        side=int(rng.integers(2)),
        fraction=float(rng.uniform(*FRACTION)),
        tilt=float(TILT * rng.standard_normal()),
        meniscus=float(rng.uniform(*MENISCUS)),
        intensity=float(INTENSITY_STD * np.clip(rng.standard_normal(), -2, 2)),
    )


def effusion_opacity(anatomy: Anatomy, noise: DiseaseNoise) -> Array:
    """Return the opacity of the fluid, (*shape) in [0, `OPACITY`]; exactly 0 outside the lung of `noise.side`."""
    lung = anatomy.lungs[noise.side]
    if not lung.any():
        return np.zeros(lung.shape)
    points = pixel_centres(lung.shape)
    offset = points[-1] - points[-1][lung].mean()
    depth = points[-2] + noise.tilt * offset + noise.meniscus * offset**2
    # a quantile, not a fixed level: the filled share does not depend on the lung's shape
    surface = np.quantile(depth[lung], 1.0 - noise.fraction)
    return np.asarray(OPACITY * smoothstep((depth - surface) / SURFACE_WIDTH + 0.5) * lung)


def apply_disease(anatomy: Anatomy, noise: DiseaseNoise, disease: str) -> Array:
    """Return the scene with the disease state set.

    Args:
        anatomy: The healthy patient.
        noise: The patient's exogenous noise of the disease.
        disease: "none" or "effusion".

    Returns:
        (*shape) float64 in [0, 1]; the healthy scene unchanged outside the affected lung.

    Raises:
        UserError: If `disease` is not one of `DISEASES`.
    """
    if disease not in DISEASES:
        raise UserError(f"unknown disease {disease!r}, expected one of {', '.join(DISEASES)}")
    if disease == "none":
        return anatomy.scene
    opacity = effusion_opacity(anatomy, noise)
    fluid = np.clip(anatomy.muscle + noise.intensity, 0.0, 1.0)
    return (1.0 - opacity) * anatomy.scene + opacity * fluid
