"""The phantom's structural causal model: exogenous noise per patient, attributes, and exact counterfactuals.

An image is a function of the patient's exogenous noise and the attributes scanner and disease. As the noise is kept,
abduction is exact and a counterfactual is a second call with other attributes (abduction, action, prediction: Pearl
2009, *Causality*, section 7.1; Ribeiro et al. 2023, arXiv 2306.15764).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phantom.anatomy import AnatomyNoise, build_anatomy, draw_anatomy_noise
from nnunet_cfcl.phantom.disease import DISEASES, DiseaseNoise, apply_disease, draw_disease_noise
from nnunet_cfcl.phantom.scanner import SCANNERS, AcquisitionNoise, apply_scanner, draw_acquisition_noise

DEFAULT_SHAPE: dict[int, tuple[int, ...]] = {2: (96, 96), 3: (40, 56, 56)}
DEFAULT_SPACING: dict[int, tuple[float, ...]] = {2: (1.0, 1.0), 3: (1.5, 1.0, 1.0)}
MINIMUM_SIZE = 16
"""Fewest pixels along an axis that show all organs."""

INTERVENTIONS: dict[str, tuple[str, ...]] = {
    "scanner": ("scanner",),
    "disease": ("disease",),
    "scanner_disease": ("scanner", "disease"),
}
"""Name of each intervention and the attributes it flips."""


@dataclass(frozen=True)
class Attributes:
    """The parents of an image that can be intervened on.

    Raises:
        UserError: If a value is unknown.
    """

    scanner: str
    disease: str

    def __post_init__(self) -> None:
        for key, known in (("scanner", tuple(SCANNERS)), ("disease", DISEASES)):
            if getattr(self, key) not in known:
                raise UserError(f"unknown {key} {getattr(self, key)!r}, expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Patient:
    """Exogenous noise of one patient, which together with the attributes determines image and mask.

    Attributes:
        seed, index: Seed and number of the patient.
        shape: Image size ([z,] y, x).
        spacing: Pixel size in mm, same axes.
        anatomy, disease, acquisition: Exogenous noise of the three mechanisms, mutually independent.
    """

    seed: int
    index: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    anatomy: AnatomyNoise
    disease: DiseaseNoise
    acquisition: AcquisitionNoise


class Rendering(NamedTuple):
    """An image, (*shape) float32 in [0, 1], and its true mask, (*shape) uint8."""

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]


def _check_grid(dim: int, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    if len(shape) != dim or len(spacing) != dim:
        raise UserError(f"a {dim}D phantom needs {dim} sizes and spacings, found shape {shape}, spacing {spacing}")
    if min(shape) < MINIMUM_SIZE or min(spacing) <= 0:
        raise UserError(f"every axis needs at least {MINIMUM_SIZE} pixels of positive size, found {shape}, {spacing}")


def draw_patient(
    seed: int, index: int, dim: int = 2, shape: Sequence[int] | None = None, spacing: Sequence[float] | None = None
) -> Patient:
    """Draw patient number `index`; the result depends on (seed, index) and the grid alone.

    Args:
        seed, index: Non-negative integers.
        dim: 2 or 3.
        shape: Image size; None: `DEFAULT_SHAPE`.
        spacing: Pixel size in mm; None: `DEFAULT_SPACING`.

    Raises:
        UserError: If dimension, shape and spacing disagree or the image is too small for the anatomy.
    """
    if dim not in DEFAULT_SHAPE:
        raise UserError(f"the phantom has 2 or 3 dimensions, found dim={dim!r}")
    size = tuple(int(n) for n in (DEFAULT_SHAPE[dim] if shape is None else shape))
    pixel = tuple(float(s) for s in (DEFAULT_SPACING[dim] if spacing is None else spacing))
    _check_grid(dim, size, pixel)
    # one stream per mechanism: a change of the numbers drawn by one of them leaves the others unchanged
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence([seed, index]).spawn(3)]
    return Patient(
        seed=seed,
        index=index,
        shape=size,
        spacing=pixel,
        anatomy=draw_anatomy_noise(streams[0], size),
        disease=draw_disease_noise(streams[1]),
        acquisition=draw_acquisition_noise(streams[2], size),
    )


def render(patient: Patient, scanner: str, disease: str) -> Rendering:
    """Compute image and mask of a patient under given attributes: factual and counterfactual alike.

    Args:
        patient: The exogenous noise.
        scanner: "A" or "B".
        disease: "none" or "effusion".

    Raises:
        UserError: If an attribute's value is unknown.
    """
    attributes = Attributes(scanner, disease)
    anatomy = build_anatomy(patient.anatomy)
    scene = apply_disease(anatomy, patient.disease, attributes.disease)
    image = apply_scanner(scene, SCANNERS[attributes.scanner], patient.acquisition, patient.spacing)
    return Rendering(image, anatomy.mask)


def intervene(attributes: Attributes, intervention: str) -> Attributes:
    """Return the attributes after an intervention of `INTERVENTIONS`; both attributes are binary, so it flips them.

    Raises:
        UserError: If the intervention is unknown.
    """
    if intervention not in INTERVENTIONS:
        raise UserError(f"unknown intervention {intervention!r}, expected one of {', '.join(INTERVENTIONS)}")
    values: dict[str, tuple[str, ...]] = {"scanner": tuple(SCANNERS), "disease": DISEASES}
    flipped = {}
    for key in INTERVENTIONS[intervention]:
        first, second = values[key]
        flipped[key] = second if getattr(attributes, key) == first else first
    return replace(attributes, **flipped)


def counterfactual(patient: Patient, factual: Attributes, intervention: str) -> Rendering:
    """Render the patient under an intervention: same exogenous noise, changed parents."""
    changed = intervene(factual, intervention)
    return render(patient, changed.scanner, changed.disease)
