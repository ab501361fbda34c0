"""Images of a probe and the voxels drawn in them, determined by seed, dataset and fold, never by the network."""

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

#: Number of voxels drawn from the training cases, and from the validation cases.
VOXELS = 20_000
#: Patches of a case: whether a patch is centred on a voxel of a class drawn uniformly from the classes of the case.
PATCHES = (True, True, True, False)
#: Parts of the seed: cases, voxels of the training cases, voxels of the validation cases.
CASES, TRAINING, VALIDATION = range(3)


@dataclass(frozen=True)
class ProbePatch:
    """Voxels drawn in a patch of a case.

    Attributes:
        case: name of the case.
        number: index of the patch among the training or validation patches.
        box: position and size of the patch in the case.
        voxels: (P,) flat indices in the part of the patch that is inside the image.
        labels: (P,) labels of the voxels.
    """

    case: str
    number: int
    box: CropBox
    voxels: Tensor
    labels: NDArray[np.int16]

    @property
    def inside(self) -> tuple[slice, ...]:
        """Part of the patch that is inside the image."""
        return part_inside(self.box)


@dataclass(frozen=True)
class ProbeSet:
    """Images and voxels on which every network is probed.

    Attributes:
        reader: reader of all cases of the set.
        training: cases on which the linear probe is trained.
        validation: cases on which all metrics are computed.
        patients: patient of each case.
        training_patches: patches with drawn voxels of the training cases.
        validation_patches: patches with drawn voxels of the validation cases.
        shares: label -> share of the voxels in the training cases' label maps; voxels without a label count as
            background, as in nnU-Net's training, the ignore label is left out.
        ignore_label: label of voxels without ground truth.
        patch_size: (D,) patch size of the plan.
        identity: everything the set depends on, as JSON.
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
        """Digest of `identity` and every drawn voxel; metrics of different sets are not comparable."""
        content = hashlib.sha256()
        for patch in (*self.training_patches, *self.validation_patches):
            content.update(f"{patch.case} {patch.box.start} {patch.box.size}".encode())
            content.update(patch.voxels.numpy().tobytes() + patch.labels.tobytes())
        return digest([dict(self.identity), content.hexdigest()])


def draw_probe_set(fold: FoldContext, seed: int, count: int) -> ProbeSet:
    """Choose cases of a fold and draw voxels in them.

    Training cases of validation patients are left out (see `known_patients`), as in the pretraining.

    Args:
        fold: fold to probe.
        seed: seed of cases and voxels.
        count: most training cases, and most validation cases.

    Raises:
        UserError: the fold has no validation cases, cases are not preprocessed, all training cases are of validation
            patients, or there are fewer than two classes.
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
                            f"the labels {found}, expected two classes or more", "check labelsTr of this dataset")
    identity = {"dataset": folder.parent.name, "data_identifier": folder.name, "fold": fold.fold, "seed": seed,
                "patch_size": list(patch_size), "training": training, "validation": validation}
    return ProbeSet(reader, tuple(training), tuple(validation), patients, drawn[0], drawn[1],
                    _shares(reader, training, ignored), ignored, patch_size, identity)


def _split(fold: FoldContext, patients: Patients) -> tuple[list[str], list[str]]:
    """Split the fold into sorted training and validation cases without common patients."""
    folder = fold.preprocessed
    if fold.fold == "all":
        raise UserError("fold all has no held-out validation cases, expected a numbered fold", "write -f 0")
    fix = preprocess_command(folder.parent.name, fold.configuration_name, fold.plans.plans_name)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"there are no preprocessed cases in {folder}", f"run {fix}")
    training, validation = (sorted(cases) for cases in fold.split())
    known = set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    if missing := sorted({*training, *validation} - known):
        raise UserError(f"the fold has {len(missing)} cases that are not in {folder}: {listed(missing)}",
                        f"run {fix}, or correct splits_final.json")
    held_out = {patients.of(case) for case in validation}
    kept = [case for case in training if patients.of(case) not in held_out]
    if not kept or not validation:
        raise UserError(f"fold {fold.fold} has {len(kept)} training cases of patients outside the validation set "
                        f"and {len(validation)} validation cases, expected both to be above 0",
                        f"check splits_final.json{f' and {patients.table}' if patients.table else ''}")
    return kept, validation


def _spread(names: Sequence[str], count: int, seed: int, part: int) -> list[str]:
    """Choose at most ``count`` evenly spaced names with a random offset."""
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
    """Iterate over the label maps (Z, Y, X) of cases, as nnU-Net stores them."""
    for case in cases:
        yield reader.labels(case, tuple(slice(0, n) for n in reader.shape(case)[1:]))[0]
