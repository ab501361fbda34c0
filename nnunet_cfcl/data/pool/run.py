"""Check and preprocessing of unlabelled images and silver labels: ``nnunet_cfcl pool``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.data.attribute_table import ATTRIBUTES
from nnunet_cfcl.data.patients import read_patients, store_patients
from nnunet_cfcl.data.pool.check import CaseCheck
from nnunet_cfcl.data.pool.dataset import PoolDataset, open_pool_dataset
from nnunet_cfcl.data.pool.find_cases import POOL_IMAGES, SILVER_LABELS, RawCase, RawPool, find_raw_pool
from nnunet_cfcl.data.pool.manifest import (
    CaseRecord,
    Manifest,
    manifest_file,
    pool_folder,
    read_manifest,
    silver_folder,
    write_manifest,
)
from nnunet_cfcl.data.pool.preprocess import CasePreprocessing, scratch_folder
from nnunet_cfcl.data.pool.silver_model import SilverModel, read_record
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.csv_table import check_case_names
from nnunet_cfcl.runs.workers import PoolWorkers

# the manifest of a large pool has megabytes; a kill loses the cases of at most this many seconds
SAVE_EVERY_S = 5.0
# model of `nnunet_cfcl silver` and the cases whose labels it made
_Made = tuple[SilverModel | None, Sequence[str]]


def preprocess_pool(
    dataset: str | int, configuration: str, plans: str = "nnUNetPlans", processes: int = 1,
    log: Callable[[str], object] = print,
) -> tuple[Manifest | None, Manifest | None]:
    """Check, then preprocess the pool and the silver labels of a dataset for one configuration, and store its patients.

    Args:
        dataset: name or number.
        configuration: one of the plan's configurations.
        plans: plans identifier.
        processes: number of cases checked or preprocessed in parallel.
        log: function that receives the log lines: outdated cases and the summary.

    Returns:
        The complete manifests of the pool and of the training cases' silver labels; None where there are no cases.

    Raises:
        UserError: there is nothing to preprocess, or files are invalid; all are listed, and nothing is written.
    """
    target = open_pool_dataset(str(dataset), configuration, plans)
    raw = find_raw_pool(target.raw, target.dataset_json)
    folders = [kind(target.preprocessed) for kind in (pool_folder, silver_folder)]
    # an empty folder is intended, a missing one may be on a disk that is not mounted
    emptied = any((target.raw / name).is_dir() for name in (POOL_IMAGES, SILVER_LABELS)) and any(
        manifest_file(folder).exists() for folder in folders)
    if not raw.cases and not raw.problems and not emptied:
        raise UserError(f"there are no images in {target.raw / POOL_IMAGES} and no silver labels of training cases in "
                        f"{target.raw / SILVER_LABELS}",
                        f"put images named CASE_0000{target.dataset_json['file_ending']} into {POOL_IMAGES}")
    patients, made = _patients(target, raw), _labelling_model(target, raw)
    pools = [_Folder.find(folder, [case for case in raw.cases if case.training == of_training], target, made)
             for folder, of_training in zip(folders, (False, True))]
    with PoolWorkers(target, processes) as workers:
        check_cases([case for pool in pools for case in pool.due], raw.problems, workers, target.command)
        for pool in pools:
            _log_changes(pool, log)
        store_patients(target.preprocessed.parent, patients)
        for pool in pools:
            pool.preprocess(workers)
    _log_summary(pools, target, log)
    done = [read_manifest(pool.folder) for pool in pools]
    return done[0], done[1]


@dataclass(frozen=True)
class _Folder:
    """The pool, or the training cases' silver labels, and the work to do.

    Attributes:
        folder: folder of the preprocessed files.
        preprocessing: digest of the current plan's preprocessing.
        kept: case -> record of the cases that are up to date.
        due: cases to preprocess.
        changed: cases among ``due`` that were preprocessed before.
        gone: preprocessed cases that are no longer in the raw dataset.
        replanned: whether all cases are due because the plan or the labels changed.
        model: model of ``nnunet_cfcl silver`` that made silver labels; None: no such labels.
        model_cases: cases whose silver labels it made.
    """

    folder: Path
    preprocessing: str
    kept: Mapping[str, CaseRecord]
    due: Sequence[RawCase]
    changed: Sequence[str]
    gone: Sequence[str]
    replanned: bool
    model: SilverModel | None
    model_cases: Sequence[str]

    @classmethod
    def find(
        cls, folder: Path, cases: Sequence[RawCase], target: PoolDataset, made: _Made
    ) -> _Folder:
        manifest = read_manifest(folder) or Manifest(target.preprocessing, True, {})
        known, replanned = manifest.cases, manifest.preprocessing != target.preprocessing
        kept = {} if replanned else {case.name: known[case.name] for case in cases
                                     if case.name in known and _is_current(folder, known[case.name], case)}
        due = [case for case in cases if case.name not in kept]
        gone = sorted(known.keys() - {case.name for case in cases})
        model, labelled = made
        own = sorted({case.name for case in cases if case.silver}.intersection(labelled))
        return cls(folder, target.preprocessing, kept, due, [case.name for case in due if case.name in known], gone,
                   replanned and bool(known), model if own else None, own)

    def preprocess(self, workers: PoolWorkers) -> None:
        """Preprocess the due cases; the manifest lists a case only while all its files are complete."""
        scratch = scratch_folder(self.folder)
        shutil.rmtree(scratch, ignore_errors=True)
        if not self.kept and not self.due:
            manifest_file(self.folder).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        records = dict(self.kept)
        self._save(records, complete=False)
        self._clean()
        saved = time.monotonic()
        try:
            for case, record in workers.each(CasePreprocessing, self.due, "preprocessing"):
                records[case.name] = record
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self._save(records, complete=False)
                    saved = time.monotonic()
        finally:
            # before the manifest, which needs the space on a full disk
            shutil.rmtree(scratch, ignore_errors=True)
            self._save(records, complete=len(records) == len(self.kept) + len(self.due))

    def _save(self, records: Mapping[str, CaseRecord], complete: bool) -> None:
        own = tuple(case for case in self.model_cases if case in records)
        write_manifest(self.folder, Manifest(self.preprocessing, complete, records, self.model, own))

    def _clean(self) -> None:
        """Remove files that belong to no finished case; the manifest no longer lists them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = {name for record in self.kept.values() for name in record.files}
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in wanted:
                path.unlink()


def _is_current(folder: Path, record: CaseRecord, case: RawCase) -> bool:
    return record.sources == case.signature() and all((folder / name).is_file() for name in record.files)


def check_cases(cases: Sequence[RawCase], problems: Sequence[str], workers: PoolWorkers, command: str) -> None:
    """Read all files of the cases and check them.

    Args:
        cases: cases to check.
        problems: problems found before.
        workers: processes, which hold the `PoolDataset`.
        command: command to run after the correction, for the error.

    Raises:
        UserError: there are problems; all are listed.
    """
    found = {case.name: lines for case, lines in workers.each(CaseCheck, cases, "checking")}
    lines = [*problems, *(line for case in cases for line in found[case.name])]
    if lines:
        raise UserError(f"{len(lines)} problems in {workers.dataset.raw}; nothing was written",
                        f"correct these files or remove them, then run {command}", lines)


def _patients(target: PoolDataset, raw: RawPool) -> dict[str, str] | None:
    """Read the patients; a table that is unreadable or has other case names is added to the problems."""
    try:
        patients = read_patients(target.raw)
        check_case_names(patients or (), raw.known, target.dataset_json["file_ending"], str(target.raw / ATTRIBUTES))
        return patients
    except UserError as error:
        raw.problems.append(str(error))
        return None


def _labelling_model(target: PoolDataset, raw: RawPool) -> _Made:
    """Read which labels of labelsSilver a model of ``nnunet_cfcl silver`` made; a damaged record is added to the
    problems."""
    folder = target.raw / SILVER_LABELS
    try:
        record = read_record(folder)
    except UserError as error:
        raw.problems.append(str(error))
        return None, ()
    return (record.model, record.own_labels(folder, target.dataset_json["file_ending"])) if record else (None, ())


def _log_changes(pool: _Folder, log: Callable[[str], object]) -> None:
    """Log the cases that are preprocessed again or removed."""
    if pool.replanned:
        log(f"{pool.folder.name}: the plan or the labels changed, all cases are preprocessed again")
    elif pool.changed:
        log(f"{pool.folder.name}: {len(pool.changed)} cases changed and are preprocessed again: "
            f"{', '.join(pool.changed)}")
    if pool.gone:
        log(f"{pool.folder.name}: {len(pool.gone)} cases are gone from the raw dataset and removed: "
            f"{', '.join(pool.gone)}")


def _log_summary(pools: Sequence[_Folder], target: PoolDataset, log: Callable[[str], object]) -> None:
    for pool, what in zip(pools, ("cases of the pool", "silver labels of training cases")):
        if manifest := read_manifest(pool.folder):
            new = f"{len(pool.due)} new, " if len(pool.due) < len(manifest.cases) else ""
            log(f"{len(manifest.cases)} {what} ({new}{_silver_summary(manifest)}) in {pool.folder}")
    silver = any(manifest.with_silver() for pool in pools if (manifest := read_manifest(pool.folder)))
    plans = "" if target.plans_name == "nnUNetPlans" else f" -p {target.plans_name}"
    # labels of a model are for trainings of its own fold
    fold = next((pool.model.fold for pool in pools if pool.model), "0")
    log(f"next: nnUNetv2_train {int(target.name[7:10])} {target.configuration_name} {fold}{plans} "
        f"-tr {'nnUNetTrainerSDVDCL' if silver else 'nnUNetTrainerDVDCL'}")


def _silver_summary(manifest: Manifest) -> str:
    records = [manifest.cases[case] for case in manifest.with_silver()]
    given = [record.quality for record in records if record.quality_given]
    quality = f"mean quality {sum(given) / len(given):.2f} of the {len(given)} given" if given else "no quality given"
    voxels = sum(record.probabilities for record in records)
    return f"{len(records)} with silver labels, {quality}, {voxels} with a confidence per voxel" if records else (
        "no silver labels")
