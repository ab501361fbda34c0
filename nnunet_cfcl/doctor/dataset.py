"""Checks of one dataset: preprocessed cases, split and settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_cfcl.config import CONFIG_VARIABLE, Settings, SettingsError, resolve_settings
from nnunet_cfcl.errors import CheckResult, UserError, listed
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.files.lenient_json import read_json_object
from nnunet_cfcl.nnunet.lookup import preprocess_command, preprocessed_cases, preprocessed_folder


def check_preprocessed(dataset: str, plans: str, configuration: str, block: dict[str, Any]) -> Iterator[CheckResult]:
    """Check that every raw training case is preprocessed and that the split names preprocessed cases only.

    Raises:
        UserError: there are no preprocessed cases.
    """
    folder, fix = preprocessed_folder(dataset, block), preprocess_command(dataset, configuration, plans)
    cases = preprocessed_cases(folder, fix)
    missing = sorted(_raw_cases(dataset) - cases)
    if missing:
        yield CheckResult("FAIL", f"{len(missing)} training cases are missing in {folder}: {listed(missing)}", fix)
    else:
        yield CheckResult("ok", f"{len(cases)} preprocessed cases in {folder}")
    yield _check_split(folder.parent / "splits_final.json", cases, fix)


def _raw_cases(dataset: str) -> set[str]:
    """Training cases of the raw dataset; empty where it is not on this machine, since training does not need it."""
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

    folder = Path(os.environ.get("nnUNet_raw") or "") / dataset
    description = read_json_object(folder / "dataset.json", []) if os.environ.get("nnUNet_raw") else {}
    if "dataset" in description:
        return set(description["dataset"])
    if "file_ending" not in description or not (folder / "imagesTr").is_dir():
        return set()
    found = get_identifiers_from_splitted_dataset_folder(str(folder / "imagesTr"), description["file_ending"])
    return set(map(str, found))


def _check_split(file: Path, cases: set[str], fix: str) -> CheckResult:
    if not file.is_file():
        if len(cases) < 5:
            return CheckResult("FAIL", f"nnU-Net cannot split {len(cases)} cases into five folds",
                               f"write {file}, or train fold all")
        return CheckResult("ok", "no splits_final.json yet, nnU-Net will create five folds")
    try:
        splits = read_json(file)
        named = {case for split in splits for part in ("train", "val") for case in split[part]}
    except (OSError, ValueError, KeyError, TypeError):
        return CheckResult("FAIL", f"{file} is not a list of folds with the keys train and val",
                           f"rm {file}, nnU-Net will create five folds")
    unknown = sorted(named - cases)
    if unknown:
        return CheckResult("FAIL", f"{file} names cases that are not preprocessed: {listed(unknown)}",
                           f"{fix}, or rm {file}")
    return CheckResult("ok", f"splits_final.json with {len(splits)} fold{'s' if len(splits) != 1 else ''}")


def check_settings(block: dict[str, Any] | None) -> Settings:
    """Resolve the settings that a training of this configuration would use.

    Args:
        block: configuration block of the plan; None: defaults and settings file alone.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or range.
    """
    try:
        return resolve_settings((block or {}).get("cfcl"))
    except SettingsError as error:
        file = os.environ.get(CONFIG_VARIABLE)
        if isinstance(error.__cause__, OSError):
            raise  # the file is not there: nothing to edit
        edit = f"edit {file} or the plan" if file else "edit the plan"
        raise UserError(error.message, f"{edit} ({error.fix})" if error.fix else edit) from error
