"""Phantom patients as patches, and generators of known quality: the phantom's own counterfactuals, and worse ones.

All generators look up images of every patient and combination of attributes; an image's patient is identified by its
voxels, so that counterfactuals can be changed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.phantom import phantom_cases, render

SCANNER, DISEASE = Attribute("scanner", "binary", ("A", "B")), Attribute("disease", "binary", ("effusion", "no"))
CODING = AttributeCoding((SCANNER, DISEASE))
INTERVENTIONS = (Intervention((SCANNER,)), Intervention((DISEASE,)), Intervention((SCANNER, DISEASE)))
STATES = tuple(product(SCANNER.values, DISEASE.values))
State = tuple[str, str]


@dataclass(frozen=True)
class Phantoms:
    """Observed images, and images of every state, (N, 1, *shape)."""

    patches: Patches
    every: Mapping[State, Tensor]


def phantoms(count: int, test: bool, shape: tuple[int, ...] = (48, 48), spacing: tuple[float, ...] = (2.0, 2.0)
             ) -> Phantoms:
    """Phantom patients whose images are standardised one by one, as by nnU-Net."""
    every: dict[State, list[Tensor]] = {state: [] for state in STATES}
    cells, labels, cases = [], [], phantom_cases(count, 0, len(shape), shape, spacing, test=test)
    for case in cases:
        for scanner, disease in STATES:
            rendering = render(case.patient, scanner, "none" if disease == "no" else disease)
            image = torch.from_numpy(rendering.image)
            every[scanner, disease].append(((image - image.mean()) / image.std())[None])
        labels.append(torch.from_numpy(rendering.mask.astype(np.int16)))
        cells.append({"scanner": case.attributes.scanner,
                      "disease": "no" if case.attributes.disease == "none" else case.attributes.disease})
    stacked = {state: torch.stack(images) for state, images in every.items()}
    taken = torch.stack([stacked[cell["scanner"], cell["disease"]][n] for n, cell in enumerate(cells)])
    return Phantoms(Patches(taken, tuple(case.name for case in cases), tuple(cells), torch.stack(labels)), stacked)


def scale_of(patches: Patches) -> IntensityScale:
    """Intensity scale of the patches."""
    return IntensityScale.of_quantiles([intensity_quantiles(image) for image in patches.images])


class TrueCounterfactuals:
    """The phantom's own counterfactuals, the optimum."""

    device = torch.device("cpu")
    coding = CODING

    def __init__(self, every: Mapping[State, Tensor], scale: IntensityScale) -> None:
        self.every, self.scale = every, scale
        self.patient = {_key(image): n for images in every.values() for n, image in enumerate(images)}

    def counterfactuals(self, images: Tensor, parents: Tensor, others: Tensor) -> Tensor:
        made = []
        for image, before, after in zip(images, parents, others):
            patient = self.patient[_key(image)]
            made.append(self.change(image, patient, _state(before), _state(after)))
            self.patient.setdefault(_key(made[-1]), patient)
        return torch.stack(made)

    def change(self, image: Tensor, patient: int, before: State, after: State) -> Tensor:
        return self.every[after][patient]

    def reconstruct(self, images: Tensor, parents: Tensor) -> Tensor:
        return 0.9 * images


class Nothing(TrueCounterfactuals):
    """Generator without effect."""

    def change(self, image, patient, before, after):
        return image


class MovesAnatomy(TrueCounterfactuals):
    """Right intensities at displaced positions, reversible."""

    moved = 2

    def change(self, image, patient, before, after):
        here = self.every[after][patient]
        moves = after != before and torch.equal(image, self.every[before][patient])
        return here.roll((self.moved, self.moved), (1, 2)) if moves else here


class OnlyScanner(TrueCounterfactuals):
    """Changes the scanner but not the disease."""

    def change(self, image, patient, before, after):
        own = next(state for state in STATES if torch.equal(self.every[state][patient], image))
        return self.every[after[0], own[1]][patient]


class DiseaseWithScanner(TrueCounterfactuals):
    """Confounded: a change of the scanner flips the disease too."""

    def change(self, image, patient, before, after):
        if before[0] == after[0]:
            return self.every[after][patient]
        return self.every[after[0], "no" if before[1] == "effusion" else "effusion"][patient]


class AnotherPatient(TrueCounterfactuals):
    """Shows another patient of the target group."""

    def change(self, image, patient, before, after):
        return self.every[after][(patient + (after != before)) % len(self.every[after])]


class Restless(TrueCounterfactuals):
    """Changes images even without an intervention."""

    def change(self, image, patient, before, after):
        return self.every[after][patient] + 0.2


def _key(image: Tensor) -> bytes:
    return image.numpy().tobytes()


def _state(parents: Tensor) -> State:
    return SCANNER.values[int(parents[0])], DISEASE.values[int(parents[2])]
