"""What the generator learns from: patches of the cases and their attributes."""

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
#: A patch without any contrast teaches nothing: so many positions are tried.
POSITIONS_TRIED = 8


@dataclass(frozen=True)
class Patches:
    """Patches of cases, whole 2D images where they are no larger.

    Attributes:
        images: (N, C, *patch) float32, nnU-Net's preprocessed intensities, on the CPU.
        cases: the case of each.
        cells: attribute -> value of each case; a missing attribute is unknown.
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
        reader: of the cases.
        cells: case -> attribute -> value; a case that is not there has none.
        cases: to draw from.
        patch_size: D voxels.
        count: N.
        seed: of the places.
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
    """A crop (C, *patch) with contrast, where a few tries find one, and where it lies."""
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
    """Moved at random by up to ``shift`` voxels (3,) along each axis, also beyond the image."""
    moves = [int(torch.randint(-most, most + 1, (), generator=generator)) for most in shift]
    start = tuple(
        # at least one voxel of the image stays inside
        min(max(s + move, 1 - size), n - 1) for s, move, size, n in zip(box.start, moves, box.size, box.shape))
    return CropBox(start, box.size, box.shape, box.dim)


class Sample(NamedTuple):
    """What one image is learned from; collated, every field has a leading batch axis.

    Attributes:
        image: (C, *patch) float32.
        parents: (P,) its encoded attributes, one or the other hidden.
        others: (P,) those after an intervention drawn at random.
    """

    image: Tensor
    parents: Tensor
    others: Tensor


class GeneratorDataset(Dataset[Sample]):
    """Sample ``s * images_per_step + i`` is image i of step s; it depends on (seed, s, i) alone.

    Args:
        reader: of the cases.
        cells: case -> attribute -> value.
        cases: to learn from.
        coding: of the attributes.
        interventions: to draw from.
        patch_size: D voxels.
        settings: of the generator.
        seed: of all settings.
        steps: optimiser steps of the whole training.
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
        """The attributes that are not hidden this time."""
        return {name: cell for name, cell in cells.items()
                if float(torch.rand((), generator=generator)) >= self._settings.parents_dropped}

    def _case(self, index: int) -> str:
        return self._cases[shuffled(index, len(self._cases), self._seed, 1)]


def case_quantiles(reader: CaseReader, cases: Sequence[str]) -> list[Tensor]:
    """The quantile table (C, Q) of a few slices of every case."""
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
    """Cases to learn from and cases to validate on; no patient is in both.

    Values of two patients or more are found on both sides, as far as every value keeps a patient to be learned from.
    Combinations of values have their share of the validation, but none has a claim to a patient there: with many
    combinations that would be far more than ``share``.

    Args:
        cases: all of them.
        patient: case -> patient; a case that is not there is a patient of its own.
        values: case -> its values, in the order of the attributes that they are of.
        share: of the patients that is kept for validation; one at least where there are two.
        seed: of the choice.
    """
    of: dict[str, list[str]] = {}
    for case in sorted(cases):
        of.setdefault(patient.get(case, case), []).append(case)
    order = [sorted(of)[index] for index in np.random.default_rng(seed).permutation(len(of))]
    # what all patients have is found on both sides too, so that neither is empty
    shown = {name: {(-1, ""), *(pair for case in of[name] for pair in enumerate(values.get(case, ())))}
             for name in order}
    patients = Counter(value for found in shown.values() for value in found)
    learners, kept = Counter(patients), set()

    def keep_aside(name: str) -> bool:
        """Unless nobody else is left to learn one of the patient's values from."""
        if name in kept or any(learners[value] < 2 for value in shown[name]):
            return False
        kept.add(name)
        learners.subtract(shown[name])
        return True

    def missing(name: str) -> int:
        """Of the patient's values those that no patient kept aside has."""
        return sum(learners[value] == patients[value] for value in shown[name])

    for value in sorted(patients, key=lambda one: (patients[one], one)):
        if learners[value] == patients[value]:
            candidates = sorted((name for name in order if value in shown[name]), key=missing, reverse=True)
            next(filter(keep_aside, candidates), None)
    count = round(share * sum(all(patients[value] > 1 for value in found) for found in shown.values()))
    groups = _by_combination({name: of[name] for name in order}, values)
    lacking = [share * len(members) - len(kept.intersection(members)) for members in groups]
    while len(kept) < count and any(groups):
        most = max((number for number, members in enumerate(groups) if members), key=lacking.__getitem__)
        lacking[most] -= keep_aside(groups[most].pop())
    validation = sorted(case for name in kept for case in of[name])
    return sorted(set(cases) - set(validation)), validation


def _by_combination(of: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Patients in the given order, by the combination of values of their cases."""
    combinations = {name: {tuple(values.get(case, ())) for case in members} for name, members in of.items()}
    patients = Counter(one for found in combinations.values() for one in found)
    together: dict[tuple[str, ...], list[str]] = {}
    for name, found in combinations.items():
        # a patient of several combinations stands for the rarest, of which there are fewest others
        together.setdefault(min(found, key=lambda one: (patients[one], one)), []).append(name)
    return list(together.values())
