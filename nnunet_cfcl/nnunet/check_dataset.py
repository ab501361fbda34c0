"""The doctor's checks of one dataset: its name, plan, configuration, preprocessed cases, split and settings."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_cfcl.config import CONFIG_VARIABLE, Settings, SettingsError, resolve_settings
from nnunet_cfcl.errors import CheckResult, UserError, first_line, foreign_errors_as, listed
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.files.lenient_json import as_object, read_json_object

# the plans of nnU-Net's own planners; the default planner needs no flag
PLANNERS = {f"nnUNetResEncUNet{size}Plans": f"nnUNetPlannerResEnc{size}" for size in ("M", "L", "XL")}


def plan_command(dataset: str, configuration: str | None, plans: str) -> str:
    """The nnU-Net command that plans and preprocesses ``dataset`` (``DatasetXXX_NAME``) for these arguments."""
    # nnU-Net's planner sets that many threads and refuses none
    command = "env -u nnUNet_n_proc_DA " if os.environ.get("nnUNet_n_proc_DA") == "0" else ""
    command += f"nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}"
    command += f" -c {configuration}" if configuration else ""
    return command + (f" -pl {PLANNERS[plans]}" if plans in PLANNERS else "")


def preprocess_command(dataset: str, configuration: str, plans: str) -> str:
    """The nnU-Net command that preprocesses with the plan that is there."""
    return f"nnUNetv2_preprocess -d {int(dataset[7:10])} -plans_name {plans} -c {configuration}"


def find_dataset(name_or_id: str) -> str:
    """The dataset's full name, looked for in nnUNet_raw and nnUNet_preprocessed.

    Raises:
        UserError: unknown or ambiguous; the nearest name is given.
    """
    known = _datasets_in("nnUNet_raw", "nnUNet_preprocessed")
    if name_or_id in known:
        return name_or_id
    if name_or_id.isdecimal():
        # a folder of results alone makes the number ambiguous too
        found = [name for name in _datasets_in("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
                 if int(name[7:10]) == int(name_or_id)]
        if len(found) > 1:
            raise UserError(f"several datasets have the number {name_or_id}: {', '.join(found)}",
                              f"-d {found[0]}, or rename all but one")
        if found and found[0] in known:
            return found[0]
    near = difflib.get_close_matches(name_or_id, known, n=1, cutoff=0.0)
    raise UserError(
        f"no dataset {name_or_id} in nnUNet_raw or nnUNet_preprocessed ({listed(known) or 'they hold none'})",
        f"-d {near[0]}" if near else "put it into $nnUNet_raw as DatasetXXX_NAME, in nnU-Net's format")


def _datasets_in(*variables: str) -> list[str]:
    folders = [Path(os.environ[variable]) for variable in variables if os.environ.get(variable)]
    found = (entry for folder in folders for entry in folder.glob("Dataset[0-9][0-9][0-9]_*") if entry.is_dir())
    return sorted({entry.name for entry in found})


def _preprocessed_root() -> Path:
    if not os.environ.get("nnUNet_preprocessed"):
        raise UserError("the plan lies in nnUNet_preprocessed, which is not set",
                          "export nnUNet_preprocessed=/path/to/nnUNet_preprocessed")
    return Path(os.environ["nnUNet_preprocessed"])


def load_plan(dataset: str, plans: str, configuration: str | None) -> dict[str, Any]:
    """The plan ``plans`` of ``dataset``.

    Raises:
        UserError: no such plan, or it cannot be read.
    """
    folder = _preprocessed_root() / dataset
    if not (folder / f"{plans}.json").is_file():
        others = sorted(file.stem for file in folder.glob("*.json") if "configurations" in read_json_object(file, []))
        near = difflib.get_close_matches(plans, others, n=1)
        raise UserError(f"{dataset} has no plan {plans} in {folder} ({listed(others) or 'nor any other'})",
                          f"-p {near[0]}" if near else plan_command(dataset, configuration, plans))
    for name in (f"{plans}.json", "dataset.json"):
        if not read_json_object(folder / name, []):
            raise UserError(f"{folder / name} is missing or not readable",
                              plan_command(dataset, configuration, plans))
    return read_json_object(folder / f"{plans}.json", [])


def load_configuration(plan: dict[str, Any], plans: str, configuration: str) -> dict[str, Any]:
    """The configuration's block of the plan, with what it inherits.

    Raises:
        UserError: the plan has no such configuration; the nearest is named.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    known = list(as_object(plan.get("configurations")))
    if configuration not in known:
        near = difflib.get_close_matches(configuration, known, n=1, cutoff=0.0)
        raise UserError(f"the plan {plans} has no configuration {configuration} (it has {listed(known)})",
                          f"-c {near[0]}" if near else "plan again")
    # nnU-Net checks nothing before it uses it
    with foreign_errors_as(lambda error: UserError(
            f"nnU-Net cannot use the configuration {configuration} of the plan {plans} ({first_line(error)})",
            "plan again")):
        block: dict[str, Any] = PlansManager(plan).get_configuration(configuration).configuration
    return block


def preprocessed_folder(dataset: str, block: dict[str, Any]) -> Path:
    """Where nnU-Net keeps the preprocessed cases of a configuration block."""
    return _preprocessed_root() / dataset / str(block["data_identifier"])


def check_preprocessed(dataset: str, plans: str, configuration: str, block: dict[str, Any]) -> Iterator[CheckResult]:
    """Every raw training case is preprocessed, and the split names only cases that are.

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


def preprocessed_cases(folder: Path, fix: str) -> set[str]:
    """Names of the cases in a folder of preprocessed data.

    Raises:
        UserError: the folder is missing, empty, or holds foreign files.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"there are no preprocessed cases in {folder}", fix)
    try:
        return set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    except (AssertionError, KeyError) as error:
        endings = sorted({file.suffix for file in folder.iterdir() if file.is_file()} - {".pkl", ".npy"})
        raise UserError(f"nnU-Net cannot tell the format of {folder}: it holds files of type {', '.join(endings)}",
                          "move away what nnU-Net did not put there") from error


def _raw_cases(dataset: str) -> set[str]:
    """Training cases of the raw dataset; none if it is not on this machine (training does not need it)."""
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
            return CheckResult("FAIL", f"nnU-Net cannot draw five folds from {len(cases)} cases",
                           f"write {file}, or train fold all")
        return CheckResult("ok", "no splits_final.json: nnU-Net will draw five folds")
    try:
        splits = read_json(file)
        named = {case for split in splits for part in ("train", "val") for case in split[part]}
    except (OSError, ValueError, KeyError, TypeError):
        return CheckResult("FAIL", f"{file} is not a list of folds with train and val",
                           f"rm {file}, nnU-Net draws folds")
    unknown = sorted(named - cases)
    if unknown:
        return CheckResult("FAIL", f"{file} names cases that are not preprocessed: {listed(unknown)}",
                       f"{fix}, or rm {file}")
    return CheckResult("ok", f"splits_final.json: {len(splits)} folds")


def check_settings(block: dict[str, Any] | None) -> Settings:
    """The settings that a training of this configuration would use.

    Raises:
        UserError: an unknown key, a wrong type or value.
    """
    try:
        return resolve_settings((block or {}).get("cfcl"))
    except SettingsError as error:
        file = os.environ.get(CONFIG_VARIABLE)
        raise UserError(str(error), f"edit {file}" if file and file in str(error) else "edit the plan") from error


def network_channels(dataset: str, plan: dict[str, Any], configuration: str | None) -> tuple[int, int]:
    """Input and output channels of the network for this plan and configuration."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager, description = PlansManager(plan), read_json_object(_preprocessed_root() / dataset / "dataset.json", [])
    inputs = determine_num_input_channels(manager, manager.get_configuration(configuration), description)
    return int(inputs), int(manager.get_label_manager(description).num_segmentation_heads)
