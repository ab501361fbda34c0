"""Folders and manifests of the preprocessed pool and silver labels, and the check that they are up to date.

The pool is stored in ``<data_identifier>_cfcl_pool/`` beside nnU-Net's preprocessed training cases, in the same format;
silver labels of training cases are stored in ``<data_identifier>_cfcl_silver/``. The manifest of a folder is a file of
the same name with ``.json`` beside it, since nnU-Net rejects folders with foreign files. The format is described in
docs/how-to/unlabelled-and-silver.md.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_cfcl.data.pool.find_cases import POOL_IMAGES, SILVER_LABELS, pool_names, silver_names
from nnunet_cfcl.data.pool.silver_model import SilverModel
from nnunet_cfcl.errors import UserError, first_line, listed, shown
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.checksummed_json import checksummed_text, read_checksummed
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.names import is_safe_filename

FORMAT = 1
POOL_SUFFIX, SILVER_SUFFIX = "_cfcl_pool", "_cfcl_silver"


def pool_folder(preprocessed_folder: str | os.PathLike[str]) -> Path:
    """Folder of the preprocessed pool of ``nnUNet_preprocessed/DATASET/<data_identifier>``."""
    return _sibling(preprocessed_folder, POOL_SUFFIX)


def silver_folder(preprocessed_folder: str | os.PathLike[str]) -> Path:
    """Folder of the silver labels of the training cases in ``nnUNet_preprocessed/DATASET/<data_identifier>``."""
    return _sibling(preprocessed_folder, SILVER_SUFFIX)


def manifest_file(folder: Path) -> Path:
    """Manifest file of a folder of `pool_folder` or `silver_folder`."""
    return folder.with_name(f"{folder.name}.json")


def recreate_command(file: Path) -> str:
    """Instruction that recreates a damaged file of the pool, the silver labels or nnU-Net's preprocessed cases."""
    if file.parent.name.endswith((POOL_SUFFIX, SILVER_SUFFIX)):
        return "delete it, and run nnunet_cfcl pool again"
    return "run nnUNetv2_preprocess again"


def _sibling(folder: str | os.PathLike[str], suffix: str) -> Path:
    path = Path(folder)
    return path.with_name(path.name + suffix)


@dataclass(frozen=True)
class CaseRecord:
    """Manifest entry of a preprocessed case.

    Attributes:
        shape: (C, Z, Y, X) of the preprocessed image.
        silver: whether the case has a silver label.
        quality: quality of the silver label in [0, 1]; 1 if not given.
        quality_given: whether ``silver.csv`` gives the quality.
        probabilities: whether the confidence of the voxels is computed from saved probabilities.
        files: names of the case's files in the folder.
        sources: signature of the raw files.
        content: checksum of the stored voxels, the same on every machine.
    """

    shape: tuple[int, ...]
    silver: bool
    quality: float
    quality_given: bool
    probabilities: bool
    files: tuple[str, ...]
    sources: str
    content: str


@dataclass(frozen=True)
class Manifest:
    """Finished cases of one folder.

    Attributes:
        preprocessing: :func:`pool_preprocessing` of the plan that the cases were preprocessed with.
        complete: False while ``nnunet_cfcl pool`` runs, and after an interruption.
        cases: case -> record, sorted by case.
        model: model of ``nnunet_cfcl silver`` that made silver labels of these cases; None: no such labels.
        model_cases: cases whose silver labels the model made, sorted.
    """

    preprocessing: str
    complete: bool
    cases: Mapping[str, CaseRecord]
    model: SilverModel | None = None
    model_cases: tuple[str, ...] = ()

    def content(self, cases: Iterable[str] | None = None) -> str:
        """Digest of voxels, labels and qualities of some cases (None: all), part of a training's identity."""
        chosen = sorted(self.cases if cases is None else cases)
        records = [self.cases[case] for case in chosen]
        return digest([[case, record.content, record.silver, record.quality]
                       for case, record in zip(chosen, records)])

    def with_silver(self, min_quality: float = 0.0) -> tuple[str, ...]:
        """Cases whose silver label has at least quality ``min_quality``, sorted."""
        return tuple(case for case, record in sorted(self.cases.items())
                     if record.silver and record.quality >= min_quality)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder of :func:`pool_folder` or :func:`silver_folder`; None where there is none.

    Raises:
        UserError: the file is not a manifest of this format.
    """
    file = manifest_file(folder)
    if not file.is_file():
        return None
    try:
        content = read_checksummed(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        cases = {case: _record(entry) for case, entry in sorted(content["cases"].items())}
        names = (*cases, *(name for record in cases.values() for name in record.files))
        if outside := [name for name in names if not is_safe_filename(name)]:
            raise ValueError(f"invalid file names: {listed(outside)}")
        made = content.get("silver_model")
        return Manifest(str(content["preprocessing"]), bool(content["complete"]), cases,
                        SilverModel.from_json(made["model"]) if made else None,
                        tuple(case for case in made["cases"] if case in cases) if made else ())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable manifest ({first_line(error)})",
                        f"delete it and {folder}, then run nnunet_cfcl pool again") from error


def _record(entry: Mapping[str, Any]) -> CaseRecord:
    if not 0 <= entry["quality"] <= 1:
        raise ValueError(f"quality {shown(entry['quality'])}, expected 0 to 1")
    return CaseRecord(**{**entry, "shape": tuple(entry["shape"]), "files": tuple(entry["files"])})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest beside ``folder``, atomically."""
    cases = {case: dataclasses.asdict(record) for case, record in sorted(manifest.cases.items())}
    content = {"format": FORMAT, "preprocessing": manifest.preprocessing, "complete": manifest.complete, "cases": cases}
    if manifest.model is not None:
        content["silver_model"] = {"model": manifest.model.to_json(), "cases": list(manifest.model_cases)}
    write_text_atomically(manifest_file(folder), checksummed_text(content))


def preprocessing_digest(plans: PlansManager, configuration: ConfigurationManager) -> str:
    """Digest of every entry of the plan that determines preprocessed intensities."""
    block = configuration.configuration
    keys = ("data_identifier", "preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm",
            "resampling_fn_data", "resampling_fn_data_kwargs")
    content = {key: block[key] for key in keys}
    properties = plans.foreground_intensity_properties_per_channel
    return digest([content, plans.transpose_forward, plans.plans["image_reader_writer"], properties])


def pool_preprocessing(
    plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping[str, Any]
) -> str:
    """Digest of everything that determines a pool's voxels.

    Patch size and network are not included: configurations with the same ``data_identifier`` share one pool, as they
    share nnU-Net's preprocessed cases.
    """
    keys = [f"resampling_fn_{what}{part}" for what in ("seg", "probabilities") for part in ("", "_kwargs")]
    labels = [dataset_json["labels"], dataset_json.get("regions_class_order")]
    return digest([preprocessing_digest(plans, configuration),
                   {key: configuration.configuration[key] for key in keys}, labels])


def pool_command(dataset: str, configuration: str, plans: str) -> str:
    """The command that updates the pool of ``DatasetXXX_NAME``."""
    return f"nnunet_cfcl pool -d {int(dataset[7:10])} -c {configuration}" + (
        f" -p {plans}" if plans != "nnUNetPlans" else "")


def check_pool_is_current(
    preprocessed_folder: str | os.PathLike[str],
    plans: PlansManager,
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Check that imagesUn and labelsSilver are preprocessed completely and with this plan.

    Only file names are compared with the raw dataset, so that a copy on another machine passes; where ``nnUNet_raw`` is
    not set or lacks the dataset, only the manifests are checked. A dataset without a pool passes.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX/<data_identifier>``.
        plans: plan of the training.
        configuration: name of the training's configuration.
        dataset_json: content of dataset.json.

    Raises:
        UserError: the pool or the silver labels are out of date.
    """
    folder = Path(preprocessed_folder)
    expected = pool_preprocessing(plans, plans.get_configuration(configuration), dataset_json)
    pool, silver = read_manifest(pool_folder(folder)), read_manifest(silver_folder(folder))
    faults = [_manifest_fault(kind, manifest, expected)
              for kind, manifest in ((pool_folder(folder), pool), (silver_folder(folder), silver)) if manifest]
    faults += _raw_faults(folder.parent.name, dataset_json["file_ending"], pool, silver)
    if found := [fault for fault in faults if fault]:
        command = pool_command(folder.parent.name, configuration, plans.plans_name)
        raise UserError("; ".join(found), f"run {command}")


def _manifest_fault(folder: Path, manifest: Manifest, preprocessing: str) -> str | None:
    if manifest.preprocessing != preprocessing:
        return f"{folder} was preprocessed with another plan, or with other labels in dataset.json"
    if not manifest.complete:
        return f"{folder} is incomplete: preprocessing was interrupted after {len(manifest.cases)} cases"
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = sorted({name for record in manifest.cases.values() for name in record.files} - present)
    return f"{folder} lacks {len(missing)} files: {listed(missing)}" if missing else None


def _raw_faults(dataset: str, ending: str, pool: Manifest | None, silver: Manifest | None) -> list[str | None]:
    raw = Path(os.environ.get("nnUNet_raw") or "") / dataset
    if not os.environ.get("nnUNet_raw") or not raw.is_dir():
        return []
    labelled = {*(pool.with_silver() if pool else ()), *(silver.cases if silver else ())}
    return [_difference(raw / POOL_IMAGES, pool_names(raw, ending), set(pool.cases if pool else ())),
            _difference(raw / SILVER_LABELS, silver_names(raw, ending), labelled)]


def _difference(folder: Path, present: set[str], preprocessed: set[str]) -> str | None:
    # training does not need the raw folders, which may be missing on this machine
    if not folder.is_dir() or present == preprocessed:
        return None
    if not preprocessed:
        return f"{folder} has {len(present)} cases that were never preprocessed for this configuration"
    new, gone = sorted(present - preprocessed), sorted(preprocessed - present)
    changes = [f"{len(names)} {what} ({listed(names)})" for names, what in ((new, "new"), (gone, "removed")) if names]
    return f"{folder} changed since it was preprocessed: {' and '.join(changes)}"
