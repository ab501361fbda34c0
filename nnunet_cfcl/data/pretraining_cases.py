"""Selection of the pretraining's cases: the fold's training cases, the pool, or both; never a validation patient."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_cfcl.config import Settings, SilverSettings
from nnunet_cfcl.data.attribute_table import ATTRIBUTES, PATIENT
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.patients import Patients, known_patients
from nnunet_cfcl.data.pool.find_cases import POOL_IMAGES, SILVER_LABELS
from nnunet_cfcl.data.pool.manifest import (
    Manifest,
    check_pool_is_current,
    pool_command,
    pool_folder,
    read_manifest,
    silver_folder,
)
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.data.pool.silver_model import SilverModel
from nnunet_cfcl.data.pretraining_reader import Labels, PretrainingCases
from nnunet_cfcl.errors import UserError, listed, with_fix
from nnunet_cfcl.files.csv_table import check_case_names
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.lookup import preprocess_command


def pretraining_cases(
    fold: FoldContext, settings: Settings, needs_labels: bool, unpack: bool = True
) -> PretrainingCases:
    """Select the cases of the pretraining according to ``pretrain.data``, and log their numbers.

    The selection excludes the fold's validation cases and every other image of their patients (see `known_patients`);
    fold "all" holds nothing out. With ``pretrain.data: pool`` it excludes the patients of all labelled cases and is
    therefore the same for every fold.

    Args:
        fold: the fold to be trained.
        settings: resolved settings, of which ``pretrain.data`` and the section ``silver`` are read.
        needs_labels: whether the method learns from labels.
        unpack: whether to unpack cases in nnU-Net's old format, which boxes cannot be read from; False writes nothing.

    Raises:
        UserError: there are no cases, or no labels although the method needs them; the pool or the silver labels are
            not preprocessed with this plan; a case is in both the pool and the training set; a training case is not
            preprocessed; the table of attributes or its stored copy cannot be read or does not match the case names.
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
        lines += [f"WARNING: {with_fix(leak.message(str(fold.fold)), leak.fix(str(fold.fold)))}"
                  for leak in _leaks(fold, dataset, labels.silver)]
    for line in lines:
        fold.log(line)
    folders = ((dataset.folder, chosen.training), (pool_folder(dataset.folder), chosen.pool))
    if unpack:
        _unpack(folder for folder, cases in folders if cases)
    images = [PreprocessedCases(str(folder), cases) for folder, cases in folders if cases]
    return PretrainingCases(images, dataset.known, labels, patients.names, chosen.pool)


def _unpack(folders: Iterable[Path]) -> None:
    """Unpack cases in an older nnU-Net's format, which single boxes cannot be read from; others stay as they are."""
    processes = max(1, get_allowed_n_proc_DA() // 2)
    for folder in folders:
        infer_dataset_class(str(folder)).unpack_dataset(str(folder), num_processes=processes)


@dataclass(frozen=True)
class _Dataset:
    """The preprocessed labelled cases of a dataset, its pool, silver labels and patients."""

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
        """All cases of the dataset and its pool, used or not."""
        return self.labelled | self.pool.cases.keys()

    @property
    def raw(self) -> str:
        """The raw dataset, for messages."""
        return f"nnUNet_raw/{self.folder.parent.name}"

    @property
    def patients_column(self) -> str:
        """The column that names the patients, for messages."""
        return f"the column '{PATIENT}' of {self.raw}/{ATTRIBUTES}"

    @property
    def pool_command(self) -> str:
        return pool_command(self.folder.parent.name, self.configuration, self.plans)

    def check_names(self) -> None:
        """Reject a pool that shares case names with the training set, as these would be ambiguous."""
        if both := sorted(self.labelled & self.pool.cases.keys()):
            raise UserError(
                f"{len(both)} cases are in both the pool and the training set: {listed(both)}",
                f"remove or rename them in {self.raw}/{POOL_IMAGES}, then run {self.pool_command}")

    def check_preprocessed(self, training: Iterable[str]) -> None:
        """Reject training cases without preprocessed files at the start, not in the middle of a run."""
        if missing := sorted(set(training) - self.labelled):
            fix = preprocess_command(self.folder.parent.name, self.configuration, self.plans)
            raise UserError(f"the fold has {len(missing)} training cases that are not in {self.folder}: "
                            f"{listed(missing)}", f"run {fix}, or correct splits_final.json")


@dataclass(frozen=True)
class _Chosen:
    """Cases of the pretraining, and cases left out because of their patient.

    Attributes:
        training, pool: selected cases, sorted.
        training_left_out, pool_left_out: numbers of cases left out.
        held_out: cases whose patients are excluded.
        role: kind of the held-out cases, for messages: "validation" or "labelled".
    """

    training: tuple[str, ...]
    pool: tuple[str, ...]
    training_left_out: int
    pool_left_out: int
    held_out: frozenset[str]
    role: str

    def lines(self, dataset: _Dataset) -> list[str]:
        """Log lines about the selection."""
        counts = ((len(self.training), "training cases", self.training_left_out),
                  (len(self.pool), "cases of the pool", self.pool_left_out))
        parts = [f"{count} {what}" + (f" ({out} left out: same patient as a {self.role} case)" if out else "")
                for count, what, out in counts if count or out]
        return [f"phase 1 has {' and '.join(parts)}", *self._patient_lines(dataset)]

    def _patient_lines(self, dataset: _Dataset) -> list[str]:
        """Log lines about patients that the table does not name, whose images may be on both sides of the split."""
        patients, lines = dataset.patients, []
        if patients.outdated:
            lines.append(f"{patients.table} changed since its copy for trainings without nnUNet_raw was stored: run "
                         f"{dataset.pool_command} again")
        if not self.held_out:
            return lines
        if not patients.names:
            return [*lines, f"patients are not known ({dataset.patients_column} names none): every case counts as a "
                            "patient of its own"]
        if unnamed := sorted({*self.training, *self.pool, *self.held_out} - patients.names.keys()):
            lines.append(f"{patients.table} names no patient for {len(unnamed)} cases, each of which counts as a "
                         f"patient of its own: {listed(unnamed)}")
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
        raise UserError("pretrain.data is 'pool', but the dataset has no pool",
                        f"put images into {dataset.raw}/{POOL_IMAGES} and run {dataset.pool_command}")
    patients = {dataset.patients.of(case) for case in held_out}
    kept = [tuple(sorted(case for case in cases if dataset.patients.of(case) not in patients))
            for cases in (training, pool)]
    if not any(kept):
        raise UserError(f"phase 1 has no cases: all {len(training) + len(pool)} are {role} cases or of their patients",
                        f"check splits_final.json and {dataset.patients.table or dataset.patients_column}")
    return _Chosen(kept[0], kept[1], len(training) - len(kept[0]), len(pool) - len(kept[1]), held_out, role)


@dataclass(frozen=True)
class SilverLeak:
    """A model that made silver labels of a fold's pretraining and was trained on patients of the fold's validation.

    Attributes:
        model: the model.
        patients: these patients.
        dataset: ``DatasetXXX_NAME``.
        update: command that updates the pool after a labelling, where that does not; "" where it does.
    """

    model: SilverModel
    patients: frozenset[str]
    dataset: str
    update: str

    def message(self, *folds: str) -> str:
        """Describe the leak into ``folds``."""
        these = f"fold {', '.join(folds)}"
        return (f"the silver labels are of {self.model.name}, which was trained on validation patients of {these} "
                f"(such as {listed(sorted(self.patients), 3)}): validation figures of {these} are not independent")

    def fix(self, fold: str) -> str:
        """The command that makes labels for a fold."""
        return f"label again with {self.model.command(self.dataset, fold)}" + (
            f", then run {self.update}" if self.update else "")


def silver_leaks(fold: FoldContext, settings: Settings) -> tuple[SilverLeak, ...]:
    """Find the leaks of a fold's pretraining, which a method that learns from labels has.

    Args:
        fold: the fold to be trained.
        settings: resolved settings.

    Raises:
        UserError: the fold has no cases; see `pretraining_cases`.
    """
    dataset = _Dataset.of(fold)
    pool, training = _silver_cases(dataset, _choose(fold, settings.pretrain.data, dataset), settings.silver)
    return tuple(_leaks(fold, dataset, pool | training))


def _leaks(fold: FoldContext, dataset: _Dataset, used: Iterable[str]) -> Iterator[SilverLeak]:
    """Leaks of the silver labels of the cases ``used``.

    Cases that the fold itself is trained on do not count: phase 2 knows them anyway.
    """
    models = {manifest.model for manifest in (dataset.pool, dataset.silver)
              if manifest.model is not None and not set(manifest.model_cases).isdisjoint(used)}
    # fold "all" is validated on its training cases
    if not models or fold.fold == "all":
        return
    training, validation = ({str(case) for case in cases} for cases in fold.split())
    held_out = {dataset.patients.of(case) for case in validation}
    for model in models:
        known = {dataset.patients.of(case) for case in set(model.training) - training}
        if leaked := held_out & known:
            updates = (model.configuration, model.plans) == (dataset.configuration, dataset.plans)
            yield SilverLeak(model, frozenset(leaked), dataset.folder.parent.name,
                             "" if updates else dataset.pool_command)


def _silver_cases(dataset: _Dataset, chosen: _Chosen, silver: SilverSettings) -> tuple[set[str], set[str]]:
    """Chosen cases of the pool, and of the training set, whose silver labels are used."""
    pool = set(dataset.pool.with_silver(silver.min_quality)).intersection(chosen.pool)
    of_training = dataset.silver.with_silver(silver.min_quality) if silver.training_cases == "silver" else ()
    return pool, set(of_training).intersection(chosen.training)


def _labels(dataset: _Dataset, chosen: _Chosen, silver: SilverSettings) -> Labels:
    pool, training = _silver_cases(dataset, chosen, silver)
    manual = frozenset(chosen.training) - training
    if not (manual or training or pool):
        raise UserError(
            f"the method learns from labels, but none of the {len(chosen.pool)} cases of the pool has a silver label "
            f"of quality {silver.min_quality:g} or more",
            f"put label maps, such as the output of nnUNetv2_predict, into {dataset.raw}/{SILVER_LABELS} and run "
            f"{dataset.pool_command}, or set pretrain.data to 'training_and_pool'")
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
