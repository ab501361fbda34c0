"""Look-ups by nnU-Net's own rules: folders, datasets, plans, configurations, preprocessed cases, trainers.

Importing this module imports neither torch nor nnU-Net, so that the doctor can use it in a broken installation.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_cfcl.errors import CheckResult, UserError, first_line, foreign_errors_as, listed
from nnunet_cfcl.files.lenient_json import as_object, read_json_object

# the plans of nnU-Net's own planners; the default planner needs no flag
PLANNERS = {f"nnUNetResEncUNet{size}Plans": f"nnUNetPlannerResEnc{size}" for size in ("M", "L", "XL")}


def check_folders() -> Iterator[CheckResult]:
    """Check that nnU-Net's three environment variables name existing, writable folders."""
    yield _check_folder("nnUNet_raw", "planning and preprocessing", is_needed=False, is_created_by_nnunet=False)
    yield _check_folder("nnUNet_preprocessed", "training", is_needed=True, is_created_by_nnunet=False)
    yield _check_folder("nnUNet_results", "training and prediction", is_needed=True, is_created_by_nnunet=True)


def _check_folder(variable: str, purpose: str, is_needed: bool, is_created_by_nnunet: bool) -> CheckResult:
    value = os.environ.get(variable)
    if not value:
        return CheckResult("FAIL" if is_needed else "warn", f"{variable} is not set, required for {purpose}",
                           f"export {variable}=/path/to/{variable}")
    folder = Path(value)
    if not folder.is_dir():
        is_fatal = folder.exists() or (is_needed and not is_created_by_nnunet)
        return CheckResult("FAIL" if is_fatal else "warn", f"{variable}={value} is not an existing folder",
                           f"mkdir -p {value}, or export {variable}=/path/to/{variable}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return CheckResult("FAIL" if is_needed else "warn", f"{variable}={value} is not writable", f"chmod u+w {value}")
    return CheckResult("ok", f"{variable}={value}")


def find_dataset(name_or_id: str) -> str:
    """Find a dataset's full name ``DatasetXXX_NAME`` in nnUNet_raw and nnUNet_preprocessed.

    Raises:
        UserError: the dataset is unknown or its number is ambiguous; the fix names the closest match.
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
        f"no dataset {name_or_id} in nnUNet_raw or nnUNet_preprocessed (found: {listed(known) or 'none'})",
        f"-d {near[0]}" if near else "put it into $nnUNet_raw as DatasetXXX_NAME, in nnU-Net's format")


def _datasets_in(*variables: str) -> list[str]:
    folders = [Path(os.environ[variable]) for variable in variables if os.environ.get(variable)]
    found = (entry for folder in folders for entry in folder.glob("Dataset[0-9][0-9][0-9]_*") if entry.is_dir())
    return sorted({entry.name for entry in found})


def _preprocessed_root() -> Path:
    if not os.environ.get("nnUNet_preprocessed"):
        raise UserError("nnUNet_preprocessed, which holds the plan, is not set",
                        "export nnUNet_preprocessed=/path/to/nnUNet_preprocessed")
    return Path(os.environ["nnUNet_preprocessed"])


def load_plan(dataset: str, plans: str, configuration: str | None) -> dict[str, Any]:
    """Load the plans file ``plans`` of ``dataset``.

    Args:
        dataset: full name, ``DatasetXXX_NAME``.
        plans: plans identifier, the file name without ``.json``.
        configuration: configuration that the planning command in an error names; None: all.

    Raises:
        UserError: there is no such plan, or it cannot be read.
    """
    folder = _preprocessed_root() / dataset
    if not (folder / f"{plans}.json").is_file():
        others = sorted(file.stem for file in folder.glob("*.json") if "configurations" in read_json_object(file, []))
        near = difflib.get_close_matches(plans, others, n=1)
        raise UserError(f"{dataset} has no plan {plans} in {folder} (found: {listed(others) or 'none'})",
                        f"-p {near[0]}" if near else plan_command(dataset, configuration, plans))
    for name in (f"{plans}.json", "dataset.json"):
        if not read_json_object(folder / name, []):
            raise UserError(f"{folder / name} is missing or not readable",
                            plan_command(dataset, configuration, plans))
    return read_json_object(folder / f"{plans}.json", [])


def load_configuration(plan: dict[str, Any], plans: str, configuration: str) -> dict[str, Any]:
    """Resolve a configuration's block of the plan, inherited entries included.

    Raises:
        UserError: the plan has no such configuration (the fix names the closest match), or nnU-Net cannot use it.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    known = list(as_object(plan.get("configurations")))
    if configuration not in known:
        near = difflib.get_close_matches(configuration, known, n=1, cutoff=0.0)
        raise UserError(f"the plan {plans} has no configuration {configuration} (found: {listed(known) or 'none'})",
                        f"-c {near[0]}" if near else "plan again with nnUNetv2_plan_and_preprocess")
    # nnU-Net validates nothing before it uses it
    with foreign_errors_as(lambda error: UserError(
            f"nnU-Net cannot use the configuration {configuration} of the plan {plans} ({first_line(error)})",
            "plan again with nnUNetv2_plan_and_preprocess")):
        block: dict[str, Any] = PlansManager(plan).get_configuration(configuration).configuration
    return block


def preprocessed_folder(dataset: str, block: dict[str, Any]) -> Path:
    """Folder in which nnU-Net keeps the preprocessed cases of a configuration block."""
    return _preprocessed_root() / dataset / str(block["data_identifier"])


def preprocessed_cases(folder: Path, fix: str) -> set[str]:
    """Case identifiers in a folder of preprocessed data.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX/<data_identifier>``.
        fix: command that preprocesses the dataset, for the error.

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
        raise UserError(f"nnU-Net cannot determine the file format of {folder}, which holds the types "
                        f"{', '.join(endings)}", "move files that nnU-Net did not write out of this folder") from error


def plan_command(dataset: str, configuration: str | None, plans: str) -> str:
    """The nnU-Net command that plans and preprocesses ``dataset`` (``DatasetXXX_NAME``)."""
    # nnU-Net's planner passes the variable to torch as its number of threads, which must not be 0
    command = "env -u nnUNet_n_proc_DA " if os.environ.get("nnUNet_n_proc_DA") == "0" else ""
    command += f"nnUNetv2_plan_and_preprocess -d {int(dataset[7:10])}"
    command += f" -c {configuration}" if configuration else ""
    return command + (f" -pl {PLANNERS[plans]}" if plans in PLANNERS else "")


def preprocess_command(dataset: str, configuration: str, plans: str) -> str:
    """The nnU-Net command that preprocesses ``dataset`` with an existing plan."""
    return f"nnUNetv2_preprocess -d {int(dataset[7:10])} -plans_name {plans} -c {configuration}"


def network_channels(dataset: str, plan: dict[str, Any], configuration: str | None) -> tuple[int, int]:
    """Input and output channels of the network for this plan and configuration."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager, description = PlansManager(plan), read_json_object(_preprocessed_root() / dataset / "dataset.json", [])
    inputs = determine_num_input_channels(manager, manager.get_configuration(configuration), description)
    return int(inputs), int(manager.get_label_manager(description).num_segmentation_heads)


def look_up_trainer(name: str) -> type | None:
    """Look a trainer up as ``nnUNetv2_train -tr`` does, without its output and warnings; None if there is none.

    Raises:
        AssertionError: the class found is not a trainer.
    """
    from nnunet_cfcl.nnunet.compatibility import look_up

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return look_up(name)
