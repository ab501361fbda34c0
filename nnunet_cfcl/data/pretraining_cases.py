"""The cases of phase 1: the fold's training cases, the pool, or both; never a case or a patient of the validation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from numpy.typing import NDArray

from nnunet_cfcl.config import Settings, SilverSettings
from nnunet_cfcl.data.attribute_table import ATTRIBUTES, PATIENT
from nnunet_cfcl.data.cases import PreprocessedCases, certain
from nnunet_cfcl.data.patients import Patients, known_patients
from nnunet_cfcl.data.pool.manifest import (
    Manifest,
    check_pool_is_current,
    pool_command,
    pool_folder,
    read_manifest,
    silver_folder,
)
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.data.pool.sources import POOL_IMAGES, SILVER_LABELS
from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.csv_table import check_case_names
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.check_dataset import preprocess_command
from nnunet_cfcl.nnunet.fold import FoldContext


@dataclass(frozen=True)
class Labels:
    """Which labels phase 1 uses; without arguments none.

    Attributes:
        manual: cases with their manual label.
        silver: cases with their silver label, none of them in ``manual``.
        reader: of the silver labels, None where there are none.
        confidence: False takes silver labels at their word.
        content: a digest of these labels.
    """

    manual: frozenset[str] = frozenset()
    silver: frozenset[str] = frozenset()
    reader: SilverLabels | None = None
    confidence: bool = True
    content: str = ""


class PretrainingCases:
    """Boxes of the images and labels of phase 1; picklable, safe in worker processes.

    Args:
        images: readers of the folders; a case is in one of them only.
        known: all cases of the dataset and its pool, used or not.
        labels: the labels that are to be used.
        patients: case -> patient, of the cases that have one.

    Attributes:
        cases: the cases of phase 1, sorted.
        known: all cases of the dataset and its pool, sorted.
        labelled: those of ``cases`` that have labels, sorted; none where the method needs none.
        patients: case -> patient, of the cases that have one.
    """

    def __init__(
        self, images: Sequence[PreprocessedCases], known: Iterable[str], labels: Labels,
        patients: Mapping[str, str] | None = None,
    ) -> None:
        self._images, self._labels, self.patients = tuple(images), labels, dict(patients or {})
        self._reader = {case: reader for reader in images for case in reader.cases}
        self.cases = tuple(sorted(self._reader))
        self.known = tuple(sorted(known))
        self.labelled = tuple(case for case in self.cases if self.has_labels(case))

    def shape(self, case: str) -> tuple[int, ...]:
        """(C, Z, Y, X) of a case in voxels; reads no intensities."""
        return self._reader[case].shape(case)

    def read(self, case: str, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Intensities (C, z, y, x), float32, of the spatial ``box`` (three slices inside the case)."""
        return self._reader[case].read(case, box)

    def layout(self, case: str) -> tuple[Sequence[int] | None, Sequence[int] | None]:
        """Chunks and blocks of a case's own file; None where it is in nnU-Net's old format."""
        return self._reader[case].layout(case)

    def has_labels(self, case: str) -> bool:
        """Whether a case has a label that is used, manual or silver."""
        return case in self._labels.manual or case in self._labels.silver

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]] | None:
        """Label map (z, y, x) of the spatial ``box`` in the dataset's values, the ignore label as it is stored and -1
        where nothing is known, and its confidence (z, y, x) in percent; None for a case without labels."""
        if case in self._labels.manual:
            return self._reader[case].labels(case, box)
        if case not in self._labels.silver or self._labels.reader is None:
            return None
        labels, confidence = self._labels.reader.read(case, box)
        return labels, confidence if self._labels.confidence else certain(labels)

    def content(self) -> str:
        """A digest of the images and of the labels that are used, whatever the machine and its folders."""
        return digest([[reader.content() for reader in self._images], self._labels.content])

    def image_content(self) -> str:
        """The same of the images alone."""
        return digest([reader.content() for reader in self._images])


def pretraining_cases(
    fold: FoldContext, settings: Settings, needs_labels: bool, unpack: bool = True
) -> PretrainingCases:
    """The cases of phase 1 according to ``pretrain.data``; says in the log how many there are, and of which kind.

    Neither a validation case of the fold nor, according to `known_patients`, another image of a validation case's
    patient is among them; fold "all" has none to keep apart. With the pool alone no labelled case's patient is among
    them, so that they are the same for every fold.

    Args:
        fold: the fold that is trained.
        settings: ``pretrain.data`` and the section ``silver`` decide.
        needs_labels: the method learns from labels.
        unpack: cases in nnU-Net's old format are made ready for reading boxes; False writes nothing.

    Raises:
        UserError: no cases; no labels where the method needs them; a pool or silver labels that are not preprocessed,
            or not with this plan; cases in both the pool and the training set; a training case that is not
            preprocessed; a table of attributes or its stored copy that cannot be read or has other names for the cases.
    """
    dataset = _Dataset.of(fold)
    with_pool, silver = settings.pretrain.data != "training", settings.silver
    if with_pool or (needs_labels and silver.training_cases == "silver"):
        check_pool_is_current(dataset.folder, fold.plans, dataset.configuration, fold.dataset_json)
    if with_pool:
        dataset.check_names()
    patients = dataset.patients
    check_case_names(patients.names, dataset.known, fold.dataset_json["file_ending"], patients.table)
    chosen = _choose(fold, settings.pretrain.data, dataset)
    labels = Labels()
    lines = chosen.lines(dataset)
    if needs_labels:
        labels = _labels(dataset, chosen, silver)
        lines.append(_label_line(dataset, chosen, labels, silver))
    for line in lines:
        fold.log(line)
    folders = ((dataset.folder, chosen.training), (pool_folder(dataset.folder), chosen.pool))
    if unpack:
        _unpack(folder for folder, cases in folders if cases)
    images = [PreprocessedCases(str(folder), cases) for folder, cases in folders if cases]
    return PretrainingCases(images, dataset.known, labels, patients.names)


def _unpack(folders: Iterable[Path]) -> None:
    """For cases that an older nnU-Net preprocessed, of which no single box can be read; nothing happens to others."""
    processes = max(1, get_allowed_n_proc_DA() // 2)
    for folder in folders:
        infer_dataset_class(str(folder)).unpack_dataset(str(folder), num_processes=processes)


@dataclass(frozen=True)
class _Dataset:
    """What is preprocessed of a dataset: all its labelled cases, its pool; and its patients."""

    folder: Path
    configuration: str
    plans: str
    labelled: frozenset[str]
    pool: Manifest
    silver: Manifest
    patients: Patients

    @classmethod
    def of(cls, fold: FoldContext) -> _Dataset:
        folder = fold.preprocessed
        configuration, plans = fold.configuration_name, fold.plans.plans_name
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError(f"there are no preprocessed cases in {folder}", "run "
                            f"{preprocess_command(folder.parent.name, configuration, plans)}")
        labelled = frozenset(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
        pool, silver = (read_manifest(kind(folder)) or Manifest("", True, {}) for kind in (pool_folder, silver_folder))
        raw = os.environ.get("nnUNet_raw")
        patients = known_patients(Path(raw) / folder.parent.name if raw else None, folder.parent)
        return cls(folder, configuration, plans, labelled, pool, silver, patients)

    @property
    def known(self) -> frozenset[str]:
        """All cases, used or not."""
        return self.labelled | self.pool.cases.keys()

    @property
    def raw(self) -> str:
        """The raw dataset, as users call it."""
        return f"nnUNet_raw/{self.folder.parent.name}"

    @property
    def patients_column(self) -> str:
        """Where users name the patients."""
        return f"the column '{PATIENT}' of {self.raw}/{ATTRIBUTES}"

    @property
    def pool_command(self) -> str:
        return pool_command(self.folder.parent.name, self.configuration, self.plans)

    def check_names(self) -> None:
        """Refuse a pool that has names in common with the training set: nobody could tell which image is meant."""
        if both := sorted(self.labelled & self.pool.cases.keys()):
            raise UserError(f"{len(both)} cases are in both the pool and the training set: {listed(both)}", "take them "
                            f"out of {self.raw}/{POOL_IMAGES} or rename them there, then run {self.pool_command}")

    def check_preprocessed(self, training: Iterable[str]) -> None:
        """Refuse training cases without preprocessed files, before they are met in the middle of a run."""
        if missing := sorted(set(training) - self.labelled):
            fix = preprocess_command(self.folder.parent.name, self.configuration, self.plans)
            raise UserError(f"the fold has {len(missing)} training cases that are not in {self.folder}: "
                            f"{listed(missing)}", f"run {fix}, or mend splits_final.json")


@dataclass(frozen=True)
class _Chosen:
    """Cases of phase 1, sorted, and those left out because of their patient.

    Attributes:
        held_out: cases whose patients are kept away.
        role: what these cases are.
    """

    training: tuple[str, ...]
    pool: tuple[str, ...]
    training_left_out: int
    pool_left_out: int
    held_out: frozenset[str]
    role: str

    def lines(self, dataset: _Dataset) -> list[str]:
        """For the log."""
        counts = ((len(self.training), "training cases", self.training_left_out),
                  (len(self.pool), "cases of the pool", self.pool_left_out))
        said = [f"{count} {what}" + (f" ({out} left out: same patient as a {self.role} case)" if out else "")
                for count, what, out in counts if count or out]
        return [f"phase 1 has {' and '.join(said)}", *self._patient_lines(dataset)]

    def _patient_lines(self, dataset: _Dataset) -> list[str]:
        """Whoever relies on patients being kept apart must learn where the table does not name them, or a training
        elsewhere would not."""
        patients, lines = dataset.patients, []
        if patients.outdated:
            lines.append(f"{patients.table} changed since its copy for trainings without nnUNet_raw was made: run "
                         f"{dataset.pool_command} again")
        if not self.held_out:
            return lines
        if not patients.names:
            return [*lines, f"patients are not known ({dataset.patients_column}): every case counts as a patient of "
                            "its own"]
        if unnamed := sorted({*self.training, *self.pool, *self.held_out} - patients.names.keys()):
            lines.append(f"{patients.table} names no patient for {len(unnamed)} cases, each counts as a patient of its "
                         f"own: {listed(unnamed)}")
        return lines


def _choose(fold: FoldContext, data: str, dataset: _Dataset) -> _Chosen:
    training: Sequence[str]
    if data == "pool":
        training, held_out, role = (), dataset.labelled, "labelled"
    else:
        # nnU-Net's first split is of NumPy's strings, which a checkpoint must not hold
        training, validation = ([str(case) for case in cases] for cases in fold.split())
        # fold "all" is validated on its training cases
        held_out, role = frozenset(() if fold.fold == "all" else validation), "validation"
        dataset.check_preprocessed(training)
    pool = () if data == "training" else tuple(dataset.pool.cases)
    if data == "pool" and not pool:
        raise UserError("pretrain.data is 'pool', but there is none",
                        f"put images into {dataset.raw}/{POOL_IMAGES} and "
                        f"run {dataset.pool_command}")
    patients = {dataset.patients.of(case) for case in held_out}
    kept = [tuple(sorted(case for case in cases if dataset.patients.of(case) not in patients))
            for cases in (training, pool)]
    if not any(kept):
        raise UserError(f"phase 1 has no cases: all {len(training) + len(pool)} are {role} cases or of their patients",
                        f"look at splits_final.json and at {dataset.patients.table or dataset.patients_column}")
    return _Chosen(kept[0], kept[1], len(training) - len(kept[0]), len(pool) - len(kept[1]), held_out, role)


def _labels(dataset: _Dataset, chosen: _Chosen, silver: SilverSettings) -> Labels:
    pool = set(dataset.pool.with_silver(silver.min_quality)).intersection(chosen.pool)
    of_training = dataset.silver.with_silver(silver.min_quality) if silver.training_cases == "silver" else ()
    training = set(of_training).intersection(chosen.training)
    manual = frozenset(chosen.training) - training
    if not (manual or training or pool):
        raise UserError(
            f"the method learns from labels, but none of the {len(chosen.pool)} cases of the pool has a silver label "
            f"of quality {silver.min_quality:g} or more",
            f"put label maps into {dataset.raw}/{SILVER_LABELS} (an output "
            f"folder of nnUNetv2_predict is one) and run {dataset.pool_command}, or set pretrain.data to "
            "'training_and_pool'")
    content = [PreprocessedCases(str(dataset.folder), sorted(manual)).label_content() if manual else "",
               dataset.pool.content(pool), dataset.silver.content(training)]
    reader = SilverLabels(dataset.folder, silver.min_quality) if pool or training else None
    return Labels(manual, frozenset(pool | training), reader, silver.confidence, digest(content))


def _label_line(dataset: _Dataset, chosen: _Chosen, labels: Labels, silver: SilverSettings) -> str:
    candidates = set(dataset.pool.with_silver()).intersection(chosen.pool)
    if silver.training_cases == "silver":
        candidates |= set(dataset.silver.with_silver()).intersection(chosen.training)
    unused = len(candidates - labels.silver)
    why = f" ({unused} more are not used: quality below {silver.min_quality:g})" if unused else ""
    if not labels.silver:
        return f"there are no silver labels to use{why}: the fold's {len(labels.manual)} manual labels are used"
    return f"labels: {len(labels.manual)} manual, {len(labels.silver)} silver{why}"
