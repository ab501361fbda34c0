"""Data of the generator: patches of the cases and their attributes, and the split into training and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.utils.data import Dataset

from nnunet_cfcl.config import GeneratorSettings
from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import AttributeCoding
from nnunet_cfcl.data.reader import CaseReader, require_finite
from nnunet_cfcl.runs.batches import shuffled
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views.crop_box import CropBox, crop_around

Cells = Mapping[str, str]
#: Number of patches drawn until one has contrast.
POSITIONS_TRIED = 8


@dataclass(frozen=True)
class Patches:
    """Patches of cases, whole 2D images where these are no larger than a patch.

    Attributes:
        images: (N, C, *patch) float32, nnU-Net's preprocessed intensities, on the CPU.
        cases: the case of every patch.
        cells: attribute -> value, of every patch's case; a missing attribute is unknown.
        labels: (N, *patch) int16, below 0 where nothing is known; None: no case has labels.
    """

    images: Tensor
    cases: tuple[str, ...]
    cells: tuple[Cells, ...]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cases)

    def parents(self, coding: AttributeCoding) -> Tensor:
        """(N, coding.width) encoded attributes."""
        return torch.stack([coding.encode(cells) for cells in self.cells])


def draw_patches(
    reader: CaseReader, cells: Mapping[str, Cells], cases: Sequence[str], patch_size: Sequence[int], count: int,
    seed: int,
) -> Patches:
    """``count`` patches at random places, the cases in turn; the same for the same arguments.

    Args:
        reader: reader of the cases.
        cells: case -> attribute -> value; a case that is not there has no known attributes.
        cases: cases to draw from.
        patch_size: (D,) in voxels.
        count: number of patches.
        seed: seed of the places.
    """
    chosen = [cases[index % len(cases)] for index in range(count)]
    drawn = [_draw_patch(reader, case, patch_size, generator_for(seed, index)) for index, case in enumerate(chosen)]
    labels = [_labels(reader, case, box) for case, (box, _) in zip(chosen, drawn)]
    known = any(label is not None for label in labels)
    filled = [torch.full(tuple(patch_size), -1, dtype=torch.int16) if label is None else label for label in labels]
    return Patches(torch.stack([image for _, image in drawn]), tuple(chosen),
                   tuple(cells.get(case, {}) for case in chosen), torch.stack(filled) if known else None)


def _labels(reader: CaseReader, case: str, box: CropBox) -> Tensor | None:
    found = reader.labels(case, box.inside)
    return None if found is None else box.pad(found[0][None], -1)[0].to(torch.int16)


def _draw_patch(
    reader: CaseReader, case: str, patch_size: Sequence[int], generator: Generator, shift: Sequence[int] | None = None
) -> tuple[CropBox, Tensor]:
    """Box and crop (C, *patch) at a random place, with contrast if one of `POSITIONS_TRIED` crops has it."""
    shape = reader.shape(case)[1:]
    for _ in range(POSITIONS_TRIED):
        # around a voxel: even positions would hardly ever reach the image's border, where one in two or three windows
        # of the generation lies
        box = crop_around([int(torch.randint(n, (), generator=generator)) for n in shape], shape, patch_size)
        if shift is not None:
            box = _shifted(box, shift, generator)
        part = reader.read(case, box.inside)
        require_finite(part, f"case '{case}'", box.inside)
        if np.ptp(part, axis=(1, 2, 3)).any():
            break
    return box, box.extend(part)


def _shifted(box: CropBox, shift: Sequence[int], generator: Generator) -> CropBox:
    """Box moved at random by up to ``shift`` voxels (3,) along each axis, also beyond the image."""
    moves = [int(torch.randint(-most, most + 1, (), generator=generator)) for most in shift]
    start = tuple(
        # at least one voxel of the image stays inside
        min(max(s + move, 1 - size), n - 1) for s, move, size, n in zip(box.start, moves, box.size, box.shape))
    return CropBox(start, box.size, box.shape, box.dim)


class Sample(NamedTuple):
    """One image and its attributes before and after an intervention; collated, with a leading batch axis.

    Attributes:
        image: (C, *patch) float32.
        parents: (P,) encoded attributes, each of them hidden with the probability ``parents_dropped``.
        others: (P,) encoded attributes after a random intervention.
    """

    image: Tensor
    parents: Tensor
    others: Tensor


class GeneratorDataset(Dataset[Sample]):
    """Sample ``s * images_per_step + i`` is image i of step s; it depends on (seed, s, i) alone.

    Args:
        reader: reader of the cases.
        cells: case -> attribute -> value.
        cases: training cases.
        coding: encoding of the attributes.
        interventions: interventions to draw from.
        patch_size: (D,) in voxels.
        settings: settings of the generator.
        seed: seed of the draws.
        steps: number of optimiser steps of the training.
    """

    def __init__(
        self, reader: CaseReader, cells: Mapping[str, Cells], cases: Sequence[str], coding: AttributeCoding,
        interventions: Sequence[Intervention], patch_size: Sequence[int], settings: GeneratorSettings, seed: int,
        steps: int,
    ) -> None:
        self._reader, self._cells, self._cases, self._coding = reader, cells, tuple(cases), coding
        self._interventions = tuple(interventions)
        self._patch_size, self._settings, self._seed, self._steps = tuple(patch_size), settings, seed, steps
        in_plane = [round(settings.shift * n) for n in self._patch_size]
        self._shift = [0] * (3 - len(in_plane)) + in_plane

    def __len__(self) -> int:
        return self._steps * self._settings.images_per_step

    def __getitem__(self, index: int) -> Sample:
        step, image = divmod(index, self._settings.images_per_step)
        generator = generator_for(self._seed, step, image, 1)
        case = self._case(index)
        _, patch = _draw_patch(self._reader, case, self._patch_size, generator, self._shift)
        flipped = {1 + axis for axis in self._settings.mirror_axes if axis < len(self._patch_size)
                   and float(torch.rand((), generator=generator)) < 0.5}
        cells = self._seen(self._cells.get(case, {}), generator)
        chosen = self._interventions[int(torch.randint(len(self._interventions), (), generator=generator))]
        others = {**cells, **chosen.draw(generator, cells)}
        return Sample(patch.flip(tuple(flipped)), self._coding.encode(cells), self._coding.encode(others))

    def _seen(self, cells: Cells, generator: Generator) -> dict[str, str]:
        """Random choice of the attributes that are not hidden."""
        return {name: cell for name, cell in cells.items()
                if float(torch.rand((), generator=generator)) >= self._settings.parents_dropped}

    def _case(self, index: int) -> str:
        return self._cases[shuffled(index, len(self._cases), self._seed, 1)]


def case_quantiles(reader: CaseReader, cases: Sequence[str]) -> list[Tensor]:
    """Quantile table (C, Q) of the middle slices of every case."""
    return [intensity_quantiles(_middle(reader, case)) for case in cases]


def _middle(reader: CaseReader, case: str, slices: int = 16) -> NDArray[np.float32]:
    depth, *plane = reader.shape(case)[1:]
    first = max(0, (depth - slices) // 2)
    box = (slice(first, min(depth, first + slices)), *(slice(0, n) for n in plane))
    part = reader.read(case, box)
    require_finite(part, f"case '{case}'", box)
    return part


def split_patients(
    cases: Sequence[str], patient: Mapping[str, str], values: Mapping[str, Sequence[str]], share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Training cases and validation cases; no patient is in both.

    Values of two patients or more occur on both sides, as far as every value keeps a training patient. Combinations of
    values have their share of the validation, but none is sure of a patient there: with many combinations, that would
    take far more than ``share``.

    Args:
        cases: all cases.
        patient: case -> patient; a case that is not there is a patient of its own.
        values: case -> its values, in the order of the attributes.
        share: share of the patients for validation; at least one where there are two.
        seed: seed of the choice.
    """
    of: dict[str, list[str]] = {}
    for case in sorted(cases):
        of.setdefault(patient.get(case, case), []).append(case)
    order = [sorted(of)[index] for index in np.random.default_rng(seed).permutation(len(of))]
    # a value that all patients have occurs on both sides too, so that neither is empty
    chosen = _Validation({name: {(-1, ""), *(pair for case in of[name] for pair in enumerate(values.get(case, ())))}
                          for name in order})
    chosen.cover_values()
    chosen.fill(_by_combination({name: of[name] for name in order}, values), share)
    validation = sorted(case for name in chosen.kept for case in of[name])
    return sorted(set(cases) - set(validation)), validation


#: Number of an attribute and one of its values.
_Value = tuple[int, str]


class _Validation:
    """Choice of validation patients that leaves every value a training patient.

    Args:
        values: patient -> values of its cases.

    Attributes:
        kept: the patients chosen so far.
    """

    def __init__(self, values: Mapping[str, set[_Value]]) -> None:
        self._values, self.kept = values, set[str]()
        self._patients = Counter(value for found in values.values() for value in found)
        self._learners = Counter(self._patients)

    def cover_values(self) -> None:
        """Choose a patient of every value, the rarest values first."""
        for value in sorted(self._patients, key=lambda one: (self._patients[one], one)):
            if self._learners[value] == self._patients[value]:
                candidates = (name for name in self._values if value in self._values[name])
                next(filter(self._keep, sorted(candidates, key=self._missing, reverse=True)), None)

    def fill(self, groups: Sequence[list[str]], share: float) -> None:
        """Choose ``share`` of the patients, next from the group of which most is lacking; empties the groups."""
        count = round(share * sum(all(self._patients[value] > 1 for value in found) for found in self._values.values()))
        lacking = [share * len(members) - len(self.kept.intersection(members)) for members in groups]
        while len(self.kept) < count and any(groups):
            most = max((number for number, members in enumerate(groups) if members), key=lacking.__getitem__)
            lacking[most] -= self._keep(groups[most].pop())

    def _keep(self, name: str) -> bool:
        """Choose a patient, unless no other training patient has one of its values."""
        if name in self.kept or any(self._learners[value] < 2 for value in self._values[name]):
            return False
        self.kept.add(name)
        self._learners.subtract(self._values[name])
        return True

    def _missing(self, name: str) -> int:
        """Number of the patient's values that no chosen patient has."""
        return sum(self._learners[value] == self._patients[value] for value in self._values[name])


def _by_combination(of: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Lists of the patients of every combination of values, in the given order."""
    combinations = {name: {tuple(values.get(case, ())) for case in members} for name, members in of.items()}
    patients = Counter(one for found in combinations.values() for one in found)
    together: dict[tuple[str, ...], list[str]] = {}
    for name, found in combinations.items():
        # a patient of several combinations counts for the rarest, which has the fewest other patients
        together.setdefault(min(found, key=lambda one: (patients[one], one)), []).append(name)
    return list(together.values())
