"""Anatomy of the phantom: an axial view of the chest with lungs, heart and spine, in 2D (y, x) and 3D (z, y, x).

Coordinates run over (-1, 1) on every axis; y grows towards the back, x towards the patient's left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.phantom.fields import Array, correlated_noise, cosine_field, freeze, pixel_centres

LABELS: dict[str, int] = {"background": 0, "lung": 1, "heart": 2, "spine": 3}
"""Label values as in `dataset.json`."""

WARP_ORDERS = 5
"""Cosine orders per axis of the deformation."""


@dataclass(frozen=True)
class PartTemplate:
    """Mean shape of one part: the superellipsoid sum_a |(p_a - centre_a) / radii_a|^exponent <= 1.

    Triples are (z, y, x); in 2D the last two count.
    """

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    exponent: float
    position_std: float
    """Standard deviation of the centre, coordinate units."""
    size_std: float
    """Standard deviation of the log radii."""


PARTS: dict[str, PartTemplate] = {
    "body": PartTemplate((0.0, 0.02, 0.0), (1.9, 0.76, 0.92), 2.4, 0.015, 0.03),
    "lung_right": PartTemplate((0.0, 0.0, -0.45), (0.88, 0.56, 0.32), 2.2, 0.02, 0.06),
    "lung_left": PartTemplate((0.0, 0.0, 0.45), (0.88, 0.56, 0.32), 2.2, 0.02, 0.06),
    "heart": PartTemplate((0.1, -0.14, 0.10), (0.56, 0.32, 0.28), 2.0, 0.03, 0.08),
    "spine": PartTemplate((0.0, 0.47, 0.0), (3.0, 0.15, 0.16), 2.6, 0.015, 0.06),
}
"""The parts in the order in which `AnatomyNoise.position` and `.size` hold them."""

TISSUES: dict[str, float] = {
    "air": 0.03,
    "lung": 0.17,
    "fat": 0.31,
    "muscle": 0.42,
    "myocardium": 0.60,
    "blood": 0.68,
    "marrow": 0.80,
    "bone": 0.92,
}
"""Mean scene intensity in [0, 1], in the order in which `AnatomyNoise.tissue` holds them."""

TISSUE_STD = 0.012
"""Standard deviation of a tissue's intensity between patients."""

TEXTURE: dict[str, float] = {"air": 0.0, "lung": 0.030, "fat": 0.012, "muscle": 0.015}
"""Amplitude of the fine texture; every tissue not named here has DEFAULT_TEXTURE."""
DEFAULT_TEXTURE = 0.018

TEXTURE_SIGMA = 0.9
"""Correlation of the fine texture, pixels."""
VESSEL_SIGMA = 1.1
"""Width of lung vessels, pixels."""
VESSEL_THRESHOLD = 1.5
"""A lung pixel whose vessel field exceeds this (standard deviations) is part vessel."""
VESSEL_GAIN = 0.12
"""Scene intensity added per standard deviation above the threshold."""
WARP_AMPLITUDE = 0.035
"""Root mean square displacement of the deformation, coordinate units."""
CHEST_WALL = 0.84
"""Normalised body radius at which the lungs end."""
SKIN = 0.935
"""Normalised body radius at which muscle gives way to fat."""
RIB_RADII = (0.855, 0.905)
"""Normalised body radii between which ribs lie."""
RIB_COUNT = 11
RIB_PITCH = 5.0
"""Turn of the rib pattern along z, radians per coordinate unit."""
HEART_WALL = 0.68
"""Normalised heart radius of the blood pool."""
BONE_RIM = 0.72
"""Normalised spine radius at which marrow gives way to dense bone."""


@dataclass(frozen=True)
class AnatomyNoise:
    """Exogenous noise of the anatomy; standard normal, clipped to +-2 for shape and tissue.

    Attributes:
        position: (5, D) noise of the centres, one row per entry of `PARTS`.
        size: (5, D) noise of the log radii, one row per entry of `PARTS`.
        tissue: (8,) noise of the intensities, one per entry of `TISSUES`.
        warp: (D, K, ..., K) cosine coefficients, K = `WARP_ORDERS`.
        rib_phase: Angle in [0, 2 pi).
        texture: (2, *shape) white fields: fine texture, vessels.
    """

    position: Array
    size: Array
    tissue: Array
    warp: Array
    rib_phase: float
    texture: Array


@dataclass(frozen=True)
class Anatomy:
    """A healthy scene before any scanner.

    Attributes:
        scene: (*shape) float64 in [0, 1].
        mask: (*shape) uint8, values of `LABELS`.
        lungs: (2, *shape) bool, right and left.
        muscle: (*shape) float64, the intensity of muscle at every pixel, as around the lungs.
    """

    scene: Array
    mask: NDArray[np.uint8]
    lungs: NDArray[np.bool_]
    muscle: Array


def draw_anatomy_noise(rng: np.random.Generator, shape: Sequence[int]) -> AnatomyNoise:
    """Draw the exogenous noise of one patient's anatomy for an image of `shape`."""
    dim = len(shape)
    return AnatomyNoise(
        position=freeze(np.clip(rng.standard_normal((len(PARTS), dim)), -2, 2)),
        size=freeze(np.clip(rng.standard_normal((len(PARTS), dim)), -2, 2)),
        tissue=freeze(np.clip(rng.standard_normal(len(TISSUES)), -2, 2)),
        warp=freeze(rng.standard_normal((dim, *[WARP_ORDERS] * dim))),
        rib_phase=float(rng.uniform(0.0, 2.0 * np.pi)),
        texture=freeze(rng.standard_normal((2, *shape))),
    )


def part_radius(name: str, points: Array, noise: AnatomyNoise) -> Array:
    """Return the normalised radius of points in a patient's part: below 1 inside, 1 on its surface.

    Args:
        name: Key of `PARTS`.
        points: (D, *shape) deformed coordinates.
        noise: The patient's exogenous noise.
    """
    template, row, dim = PARTS[name], list(PARTS).index(name), len(points)
    centre = np.array(template.centre[-dim:]) + template.position_std * noise.position[row]
    radii = np.array(template.radii[-dim:]) * np.exp(template.size_std * noise.size[row])
    column = (dim, *[1] * dim)
    offset = np.abs((points - centre.reshape(column)) / radii.reshape(column))
    return np.asarray((offset**template.exponent).sum(0) ** (1.0 / template.exponent))


def deformed_points(noise: AnatomyNoise, shape: Sequence[int]) -> Array:
    """Return (D, *shape) pixel centres moved by the patient's smooth random deformation."""
    displacement = np.stack([cosine_field(coefficients, shape) for coefficients in noise.warp])
    return pixel_centres(shape) + WARP_AMPLITUDE * displacement


def _is_rib(points: Array, body: Array, phase: float) -> NDArray[np.bool_]:
    angle = np.arctan2(points[-2], points[-1])
    turn = RIB_PITCH * points[0] if len(points) == 3 else 0.0
    in_band = (body > RIB_RADII[0]) & (body < RIB_RADII[1])
    return np.asarray(in_band & (np.cos(RIB_COUNT * angle + turn + phase) > 0.1))


def _tissue_map(points: Array, noise: AnatomyNoise) -> tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the tissue index, the label mask and the two lungs; later parts win where parts overlap."""
    radius = {name: part_radius(name, points, noise) for name in PARTS}
    index = {name: i for i, name in enumerate(TISSUES)}
    tissue = np.zeros(points.shape[1:], np.intp)
    mask = np.zeros(points.shape[1:], np.uint8)
    tissue[radius["body"] <= 1.0] = index["fat"]
    tissue[radius["body"] <= SKIN] = index["muscle"]
    tissue[_is_rib(points, radius["body"], noise.rib_phase)] = index["bone"]
    # lungs stop at the chest wall, so a large lung in a small body does not reach the skin
    inside = radius["body"] < CHEST_WALL
    lungs = np.stack([(radius[name] <= 1.0) & inside for name in ("lung_right", "lung_left")])
    tissue[lungs.any(0)], mask[lungs.any(0)] = index["lung"], LABELS["lung"]
    heart = (radius["heart"] <= 1.0) & inside
    tissue[heart], mask[heart] = index["myocardium"], LABELS["heart"]
    tissue[radius["heart"] <= HEART_WALL] = index["blood"]
    spine = radius["spine"] <= 1.0
    tissue[spine], mask[spine] = index["bone"], LABELS["spine"]
    tissue[radius["spine"] <= BONE_RIM] = index["marrow"]
    # no fluid where heart or spine overlap a lung
    return tissue, mask, lungs & (mask == LABELS["lung"])


def build_anatomy(noise: AnatomyNoise) -> Anatomy:
    """Build the healthy scene and its true mask from a patient's exogenous noise."""
    shape = noise.texture.shape[1:]
    tissue, mask, lungs = _tissue_map(deformed_points(noise, shape), noise)
    fine = correlated_noise(noise.texture[0], [TEXTURE_SIGMA] * len(shape))
    vessels = correlated_noise(noise.texture[1], [VESSEL_SIGMA] * len(shape))
    intensity = np.array(list(TISSUES.values())) + TISSUE_STD * noise.tissue
    amplitude = np.array([TEXTURE.get(name, DEFAULT_TEXTURE) for name in TISSUES])
    scene = intensity[tissue] + amplitude[tissue] * fine
    # only the tail of the field is kept: sparse bright specks rather than more texture
    scene += VESSEL_GAIN * np.maximum(vessels - VESSEL_THRESHOLD, 0.0) * (mask == LABELS["lung"])
    muscle = intensity[list(TISSUES).index("muscle")] + TEXTURE["muscle"] * fine
    return Anatomy(np.clip(scene, 0.0, 1.0), mask, lungs, np.clip(muscle, 0.0, 1.0))
