"""The images of a probe and the voxels drawn in them: the same for every network, by seed, dataset and fold alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from nnunet_cfcl.chromap.nnunet.sampling import PreprocessedCase, draw_boxes, draw_voxels, part_inside
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.patients import Patients, known_patients
from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.fold_files import raw_folder
from nnunet_cfcl.nnunet.lookup import preprocess_command
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views.crop_box import CropBox

#: Voxels drawn of the training cases, and of the validation cases, in all.
VOXELS = 20_000
#: Patches of a case: whether one is around a voxel of a class that is drawn evenly from those of the case.
PATCHES = (True, True, True, False)
#: Parts of the seed: which cases, voxels of the training cases, of the validation cases.
CASES, TRAINING, VALIDATION = range(3)


@dataclass(frozen=True)
class ProbePatch:
    """Voxels drawn in a patch of a case.

    Attributes:
        case: its name.
        number: of the patch among those of its part of the set.
        box: where it lies.
        voxels: (P,) flat indices in the part of the patch that is in the image.
        labels: (P,) of the voxels.
    """

    case: str
    number: int
    box: CropBox
    voxels: Tensor
    labels: NDArray[np.int16]

    @property
    def inside(self) -> tuple[slice, ...]:
        """The part of the patch that is in the image."""
        return part_inside(self.box)


@dataclass(frozen=True)
class ProbeSet:
    """What every network is probed on.

    Attributes:
        reader: of all cases of the set.
        training, validation: cases the linear probe learns from, and those that all figures are of.
        patients: which cases are of one patient.
        training_patches, validation_patches: the voxels drawn in them.
        shares: label -> how much of all voxels of the training cases' label maps it is; what has no label counts as
            background, as nnU-Net trains with it, the ignore label does not count.
        ignore_label: of voxels without a truth.
        patch_size: (D,) of the plan.
        identity: all that the set depends on, JSON.
    """

    reader: PreprocessedCases
    training: tuple[str, ...]
    validation: tuple[str, ...]
    patients: Patients
    training_patches: tuple[ProbePatch, ...]
    validation_patches: tuple[ProbePatch, ...]
    shares: Mapping[int, float]
    ignore_label: int | None
    patch_size: tuple[int, ...]
    identity: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of what the set depends on, and of every drawn voxel: figures of another set cannot be compared."""
        content = hashlib.sha256()
        for patch in (*self.training_patches, *self.validation_patches):
            content.update(f"{patch.case} {patch.box.start} {patch.box.size}".encode())
            content.update(patch.voxels.numpy().tobytes() + patch.labels.tobytes())
        return digest([dict(self.identity), content.hexdigest()])


def draw_probe_set(fold: FoldContext, seed: int, count: int) -> ProbeSet:
    """Choose cases of a fold and draw voxels in them.

    A training case whose patient is in the validation has no part in it (see `known_patients`), as in the pretraining.

    Args:
        fold: the fold that is probed.
        seed: of all that is drawn.
        count: of cases, at most, in each part.

    Raises:
        UserError: the fold has no validation cases of its own, cases are not preprocessed, all training cases are of
            patients of the validation, or there are fewer than two classes.
    """
    folder = fold.preprocessed
    patients = known_patients(raw_folder(folder.parent.name), folder.parent)
    parts = _split(fold, patients)
    training, validation = (_spread(cases, count, seed, part) for part, cases in enumerate(parts))
    reader = PreprocessedCases(str(folder), [*training, *validation])
    ignored, patch_size = fold.labels.ignore_label, tuple(fold.configuration.patch_size)
    drawn = [_draw(reader, cases, ignored, patch_size, (seed, part))
             for part, cases in ((TRAINING, training), (VALIDATION, validation))]
    for words, patches in zip(("training", "validation"), drawn):
        found = sorted({int(one) for patch in patches for one in np.unique(patch.labels)})
        if len(found) < 2:
            raise UserError(f"the {words} cases ({listed(training if words == 'training' else validation, 3)}) have "
                            f"the labels {found}, expected two classes or more: are labelsTr of this dataset empty?")
    identity = {"dataset": folder.parent.name, "data_identifier": folder.name, "fold": fold.fold, "seed": seed,
                "patch_size": list(patch_size), "training": training, "validation": validation}
    return ProbeSet(reader, tuple(training), tuple(validation), patients, drawn[0], drawn[1],
                    _shares(reader, training, ignored), ignored, patch_size, identity)


def _split(fold: FoldContext, patients: Patients) -> tuple[list[str], list[str]]:
    """Training and validation cases of the fold, sorted, patients kept apart."""
    folder = fold.preprocessed
    if fold.fold == "all":
        raise UserError("fold all has no validation cases of its own, expected a fold with some: name one with -f 0")
    fix = preprocess_command(folder.parent.name, fold.configuration_name, fold.plans.plans_name)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"there are no preprocessed cases in {folder}", f"run {fix}")
    training, validation = (sorted(cases) for cases in fold.split())
    known = set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    if missing := sorted({*training, *validation} - known):
        raise UserError(f"the fold has {len(missing)} cases that are not in {folder}: {listed(missing)}", f"run {fix}, "
                        "or mend splits_final.json")
    held_out = {patients.of(case) for case in validation}
    kept = [case for case in training if patients.of(case) not in held_out]
    if not kept or not validation:
        raise UserError(f"fold {fold.fold} has {len(kept)} training cases of patients who are not in the "
                        f"validation, and {len(validation)} validation cases, expected some of both", "look at "
                        f"splits_final.json{f' and at {patients.table}' if patients.table else ''}")
    return kept, validation


def _spread(names: Sequence[str], count: int, seed: int, part: int) -> list[str]:
    """At most ``count`` of the names, evenly spread, the first one drawn."""
    count = min(count, len(names))
    begin = int(generator_for(seed, CASES, part).initial_seed() % len(names))
    places = sorted((begin + number * len(names) // count) % len(names) for number in range(count))
    return [names[place] for place in places]


def _draw(
    reader: PreprocessedCases, cases: Sequence[str], ignored: int | None, patch_size: Sequence[int],
    seed: tuple[int, int],
) -> tuple[ProbePatch, ...]:
    per_patch = max(1, VOXELS // (len(cases) * len(PATCHES)))
    patches: list[ProbePatch] = []
    for number, case in enumerate(tqdm(cases, desc="drawing voxels", unit="case", disable=None)):
        random = generator_for(*seed, number)
        for box, labels, inner in draw_boxes(PreprocessedCase(reader, case, ignored), patch_size, random, PATCHES):
            assert labels is not None
            if (known := inner & (labels >= 0)).any():
                voxels = draw_voxels(labels, known, per_patch, random)
                patches.append(ProbePatch(case, len(patches), box, voxels, labels.reshape(-1)[voxels.numpy()]))
    return tuple(patches)


def _shares(reader: PreprocessedCases, cases: Sequence[str], ignored: int | None) -> dict[int, float]:
    counts: Counter[int] = Counter()
    for labels in whole_labels(reader, cases):
        for label, count in zip(*np.unique(np.maximum(labels, 0), return_counts=True)):
            counts[int(label)] += int(count)
    del counts[-1 if ignored is None else ignored]
    return {label: count / counts.total() for label, count in sorted(counts.items())}


def whole_labels(reader: PreprocessedCases, cases: Sequence[str]) -> Iterator[NDArray[np.int16]]:
    """The label maps (Z, Y, X) of cases, one after the other, as nnU-Net stores them."""
    for case in cases:
        yield reader.labels(case, tuple(slice(0, n) for n in reader.shape(case)[1:]))[0]
