"""Labelling of the pool with a trained model: ``nnunet_cfcl silver``.

Labels are made in ``labelsSilver.tmp``, where a run that was stopped goes on, and replace labelsSilver as a whole when
all of them are finished: ``nnunet_cfcl pool`` never reads one that is cut short.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_cfcl.data.pool.dataset import PoolDataset, open_pool_dataset
from nnunet_cfcl.data.pool.find_cases import (
    POOL_IMAGES,
    QUALITIES,
    SILVER_LABELS,
    RawCase,
    SilverSource,
    find_raw_pool,
    read_qualities,
)
from nnunet_cfcl.data.pool.quality import LabelQuality, LabelReading
from nnunet_cfcl.data.pool.run import check_cases, preprocess_pool
from nnunet_cfcl.data.pool.silver_model import (
    RECORD,
    LabelState,
    SilverModel,
    SilverRecord,
    foreign_files,
    label_files,
    read_record,
    write_record,
)
from nnunet_cfcl.errors import UserError, isolated, listed
from nnunet_cfcl.files.atomic import refusals_named, writable_folder, write_text_atomically
from nnunet_cfcl.files.folder_swap import link_or_copy, restored, swap_in
from nnunet_cfcl.files.hashing import file_digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.fold_files import FINAL
from nnunet_cfcl.nnunet.lookup import preprocess_command, preprocessed_cases
from nnunet_cfcl.nnunet.prediction import load_predictor, predict_cases
from nnunet_cfcl.runs.checkpoint import check_checkpoint
from nnunet_cfcl.runs.workers import PoolWorkers

Log = Callable[[str], object]


def label_pool(fold: FoldContext, processes: int = 1, log: Log = print) -> SilverRecord:
    """Label the pool of a dataset with the finished model of a fold, then preprocess the pool for its configuration.

    Labels of an earlier run are kept if the same model made them from the same images, and replaced otherwise.

    Args:
        fold: the fold of any trainer of nnU-Net, which labels on the fold's device.
        processes: number of processes for cases; 1 works in this process.
        log: function that receives the log lines.

    Returns:
        The record of the model and its labels, as in ``labelsSilver/silver_model.json``.

    Raises:
        UserError: the training is not finished, there is no pool, images are invalid, or labelsSilver holds labels that
            this function did not make; nothing is changed.
    """
    target = open_pool_dataset(fold.dataset, fold.configuration_name, fold.plans.plans_name)
    _check_model(fold)
    pool = find_raw_pool(target.raw, target.dataset_json, with_silver=False)
    if not pool.cases and not pool.problems:
        raise UserError(f"there are no images to label in {target.raw / POOL_IMAGES}",
                        f"put images named CASE_0000{target.dataset_json['file_ending']} into it")
    folder = restored((target.raw / SILVER_LABELS).resolve())
    record = _own_record(folder, target)
    labelling = _Labelling(target, _silver_model(fold), folder, pool.cases, record, log)
    if labelling.is_done:
        log(f"all {len(pool.cases)} cases of {POOL_IMAGES} have labels of {labelling.model.name} already")
    else:
        with PoolWorkers(target, processes) as workers:
            check_cases(labelling.due, pool.problems, workers, labelling.model.command(target.name))
            labelling.run(fold, workers)
    preprocess_pool(target.name, target.configuration_name, target.plans_name, processes, log)
    found = read_record(folder)
    assert found is not None
    return found


def _check_model(fold: FoldContext) -> None:
    """Reject a model that cannot predict alone, or is not finished or damaged."""
    plans = "" if fold.plans.plans_name == "nnUNetPlans" else f" -p {fold.plans.plans_name}"
    train = (f"nnUNetv2_train {int(fold.dataset[7:10])} {fold.configuration_name} {fold.fold} "
             f"-tr {fold.trainer_class.__name__}{plans}")
    if (stage := fold.configuration.previous_stage_name) is not None:
        raise UserError(f"'{fold.configuration_name}' is a cascade's second stage and needs the first stage's masks",
                        f"-c {stage}, or nnUNetv2_predict -prev_stage_predictions FOLDER --save_probabilities")
    if not (fold.folder / FINAL).is_file():
        is_begun = any(fold.folder.glob("checkpoint_*.pth"))
        others = sorted(file.parent.name for file in fold.folder.parent.glob(f"fold_*/{FINAL}"))
        raise UserError(
            f"there is no {FINAL} in {fold.folder}: the training {'is not finished' if is_begun else 'did not begin'} "
            f"(finished: {listed(others) or 'none'})", f"run {train}{' --c' if is_begun else ''}")
    if missing := [name for name in ("dataset.json", "plans.json") if not (fold.folder.parent / name).is_file()]:
        raise UserError(f"{fold.folder.parent} is no model folder: it has no {' and no '.join(missing)}",
                        f"copy them from where the model was trained, or run {train}")
    check_checkpoint(fold.folder / FINAL, "copy it again, or train the fold again")


def _silver_model(fold: FoldContext) -> SilverModel:
    """Describe the model of a finished fold."""
    command = preprocess_command(fold.dataset, fold.configuration_name, fold.plans.plans_name)
    # nnU-Net splits the preprocessed cases
    preprocessed_cases(fold.preprocessed, f"run {command}")
    training = tuple(sorted({str(case) for case in fold.split()[0]}))
    return SilverModel(fold.trainer_class.__name__, fold.plans.plans_name, fold.configuration_name, str(fold.fold),
                       file_digest(fold.folder / FINAL), training)


def _own_record(folder: Path, target: PoolDataset) -> SilverRecord | None:
    """Read the record of labelsSilver; None without labels.

    Raises:
        UserError: there are files that the record does not contain.
    """
    record = read_record(folder)
    if others := list(foreign_files(folder, record, target.dataset_json["file_ending"])):
        raise UserError(
            f"{folder} holds {len(others)} files that nnunet_cfcl silver did not make, or that were changed since: "
            f"{listed(file.name for file in others)}; they would be replaced",
            f"mv {folder} {folder}_mine, or delete these files, then run the command again")
    return record


class _Labelling:
    """The labels that a model has made of a pool, and those that it has to make.

    Args:
        target: dataset, plan and configuration.
        model: the model.
        folder: folder of the silver labels, which need not exist.
        cases: all cases of the pool.
        record: record of the folder; None without labels.
        log: function that receives the log lines.

    Attributes:
        due: cases that have to be labelled.
    """

    def __init__(
        self, target: PoolDataset, model: SilverModel, folder: Path, cases: Sequence[RawCase],
        record: SilverRecord | None, log: Log,
    ) -> None:
        self.model, self._target, self._folder, self._log = model, target, folder, log
        self._scratch = folder.with_name(f"{folder.name}.tmp")
        self._ending = target.dataset_json["file_ending"]
        # before anything is predicted: an image that changes meanwhile is labelled again by the next run
        self._images = {case.name: case.signature() for case in cases}
        known = record.labels if record and record.model == model else {}
        self._kept = {case.name: known[case.name] for case in cases
                      if case.name in known and known[case.name].images == self._images[case.name]
                      and all(file.is_file() for file in label_files(folder, case.name, self._ending)[:2])}
        self.due = [case for case in cases if case.name not in self._kept]
        self._replaced = len(record.labels) if record and record.model != model else 0
        self._gone = len(known.keys() - {case.name for case in cases})

    @property
    def is_done(self) -> bool:
        """Whether the folder holds the labels of all cases of the pool, and no others."""
        return not self.due and not self._gone

    def run(self, fold: FoldContext, workers: PoolWorkers) -> None:
        """Label the due cases and replace the folder.

        Raises:
            UserError: nnU-Net cannot load the model or left a case without a label, or the disk cannot be written.
        """
        self._begin()
        found = self._finished(workers, self.due, must_agree=True)
        remaining = [case for case in self.due if case.name not in found]
        counts = ((len(remaining), f"cases of {POOL_IMAGES} are labelled"), (len(found), "were before an interruption"),
                  (len(self._kept), "labels are kept"), (self._replaced, "labels of another model are replaced"),
                  (self._gone, "labels without an image are removed"))
        self._log(f"{self.model.name}: {', '.join(f'{count} {what}' for count, what in counts if count)}")
        if remaining:
            with refusals_named(self._scratch, self._scratch / "probe"):
                predictor = load_predictor(fold.folder, FINAL, fold.device, "run nnunet_cfcl doctor, which finds the "
                                           "reason, or train the fold again")
                predict_cases(predictor, [case.images for case in remaining],
                              [self._scratch / case.name for case in remaining], workers.processes)
            found |= self._finished(workers, remaining, must_agree=False)
        if lost := [case.name for case in self.due if case.name not in found]:
            raise UserError(f"nnU-Net left {len(lost)} cases without a readable label: {listed(lost)}",
                            f"run {self.model.command(self._target.name)} again")
        self._publish(found)
        self._log_labels(found)

    def _begin(self) -> None:
        """Open the folder of unfinished labels, without those of another model or other images."""
        record = None
        # a damaged record is as good as none
        with isolated():
            record = read_record(self._scratch)
        if record is None or record.model != self.model:
            shutil.rmtree(self._scratch, ignore_errors=True)
        elif changed := [case for case in self.due if case.name not in record.labels
                         or record.labels[case.name].images != self._images[case.name]]:
            _remove(file for case in changed for file in label_files(self._scratch, case.name, self._ending))
        writable_folder(self._scratch, "make the folder of the dataset writable")
        write_record(self._scratch, SilverRecord(self.model, {
            case.name: LabelState(self._images[case.name]) for case in self.due}))

    def _finished(
        self, workers: PoolWorkers, cases: Sequence[RawCase], must_agree: bool
    ) -> dict[str, LabelQuality]:
        """Qualities of the cases whose files are complete in the folder of unfinished labels."""
        made = []
        for case in cases:
            label, probabilities, _ = label_files(self._scratch, case.name, self._ending)
            if label.is_file() and probabilities.is_file():
                made.append(replace(case, silver=SilverSource(label, probabilities, None)))
        read = partial(LabelReading, must_agree=must_agree)
        measured = {case.name: quality for case, quality in workers.each(read, made, "reading labels")}
        return {name: quality for name, quality in measured.items() if quality is not None}

    def _publish(self, found: Mapping[str, LabelQuality]) -> None:
        """Complete the new folder with kept labels, table and record, and put it in the place of the old one."""
        with refusals_named(self._scratch, self._scratch / "probe"):
            for case in self._kept:
                for file in label_files(self._folder, case, self._ending):
                    link_or_copy(file, self._scratch / file.name)
            qualities = {**self._kept_qualities(), **{case: quality.value for case, quality in found.items()}}
            write_text_atomically(self._scratch / QUALITIES, _table(qualities))
            made = {case.name: LabelState(self._images[case.name], file_digest(self._label(case.name)))
                    for case in self.due}
            write_record(self._scratch, SilverRecord(self.model, {**self._kept, **made}))
            own = {file.name for case in (*self._kept, *made)
                   for file in label_files(self._scratch, case, self._ending)}
            _remove(file for file in self._scratch.iterdir() if file.name not in {*own, QUALITIES, RECORD})
        swap_in(self._scratch, self._folder)

    def _label(self, case: str) -> Path:
        return label_files(self._scratch, case, self._ending)[0]

    def _kept_qualities(self) -> dict[str, float]:
        """Qualities of the kept labels as the table has them, where the user may have changed them."""
        problems: list[str] = []
        file = self._folder / QUALITIES
        found = read_qualities(file, set(self._kept), self._ending, problems) if self._kept else {}
        if problems:
            raise UserError(f"{len(problems)} problems in {file}", "correct the table, then run the command again",
                            problems)
        return found

    def _log_labels(self, found: Mapping[str, LabelQuality]) -> None:
        if found:
            lowest = min(found, key=lambda case: found[case].value)
            mean = sum(quality.value for quality in found.values()) / len(found)
            self._log(f"{len(found)} new silver labels in {self._folder}: mean quality {mean:.2f}, lowest "
                      f"{found[lowest].value:.2f} ({lowest})")
        if empty := sorted(case for case, quality in found.items() if quality.is_empty):
            self._log(f"{len(empty)} of them have no foreground, look at them: {listed(empty)}")
        use = ("validation figures of numbered folds trained with them are not independent" if self.model.fold == "all"
               else f"use them in trainings of fold {self.model.fold}, and label again for another fold")
        self._log(f"the labels hold knowledge of the model's {len(self.model.training)} training cases: {use}")


def _table(qualities: Mapping[str, float]) -> str:
    """``silver.csv`` of case -> quality."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", "quality"])
    table.writerows([case, f"{quality:.4f}"] for case, quality in sorted(qualities.items()))
    return text.getvalue()


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
