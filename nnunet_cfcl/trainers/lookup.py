"""Trainers by name, as ``nnUNetv2_train -tr NAME`` would find them."""

from __future__ import annotations

import difflib
import os
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl import trainers
from nnunet_cfcl.errors import CheckResult, UserError
from nnunet_cfcl.nnunet.installation import EXPORT_COMMAND, INSTALL_COMMAND
from nnunet_cfcl.nnunet.lookup import look_up_trainer
from nnunet_cfcl.nnunet.versions import reads_external_trainers


def plugin_trainers() -> tuple[str, ...]:
    """Names of the package's trainers that ``nnUNetv2_train -tr`` accepts."""
    classes = {name: getattr(trainers, name) for name in trainers.__all__}
    return tuple(sorted(name for name, found in classes.items() if issubclass(found, nnUNetTrainer)))


def known_trainer(name: str) -> type[nnUNetTrainer] | None:
    """The trainer's class; None if there is none, which `check_trainer` reports.

    The package's own trainers are known even while nnU-Net does not find them.
    """
    try:
        return getattr(trainers, name) if name in plugin_trainers() else look_up_trainer(name)
    except Exception:  # whatever breaks the look-up is a finding of `check_trainer` already
        return None


def pretraining_trainer(name: str) -> type[nnUNetTrainer] | None:
    """`known_trainer` if it has our pretraining phase, else None."""
    found = known_trainer(name)
    return found if found is not None and issubclass(found, trainers.CounterfactualPretraining) else None


def find_trainer(name: str) -> Any:
    """The class that ``-tr`` names.

    Raises:
        UserError: nnU-Net does not find it, or it has no pretraining phase.
    """
    found = pretraining_trainer(name)
    if found is None:
        check_trainer(name).raise_on_failure()
        raise UserError(f"{name} has no pretraining phase: name one of the plugin's trainers (`nnunet_cfcl trainers` "
                        "lists them), or give yours the base class CounterfactualPretraining")
    return found


def check_trainer(name: str) -> CheckResult:
    """The trainer is found by nnU-Net's own look-up, as ``nnUNetv2_train -tr`` would find it."""
    try:
        found = look_up_trainer(name)
    except AssertionError:
        return CheckResult("FAIL", f"{name} is found, but is no trainer of nnU-Net",
                           "derive the class from nnUNetTrainer")
    if found is not None:
        return CheckResult("ok", f"trainer {name} found ({found.__module__})")
    missing = [path for path in _external_folders() if not os.path.exists(path)]
    where = f" (nnUNet_extTrainer names {', '.join(missing)}, which does not exist)" if missing else ""
    return CheckResult("FAIL", f"nnU-Net finds no trainer {name}{where}", _way_to_trainer(name))


def _way_to_trainer(name: str) -> str:
    """The command that makes ``name`` known if it is ours, else the nearest name there is."""
    ours = plugin_trainers()
    if name in ours:
        return _command_that_finds_ours()
    near = difflib.get_close_matches(name, {*_known_trainers(), *ours}, n=1, cutoff=0.0)[0]
    unseen = near in ours and look_up_trainer(near) is None
    return f"-tr {near}" + (f", after {_command_that_finds_ours()}" if unseen else "")


def _external_folders() -> list[str]:
    return [path for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path.strip()]


def _command_that_finds_ours() -> str:
    """Sets the variable, the folders in it kept; or installs, for an nnU-Net that does not read it."""
    if not reads_external_trainers():
        return INSTALL_COMMAND
    kept = "".join(path + os.pathsep for path in _external_folders() if os.path.exists(path))
    return EXPORT_COMMAND.replace("=", f"={kept}", 1)


def _known_trainers() -> set[str]:
    """Names of all trainers loaded so far; a look-up that found nothing has loaded every module there is."""
    names, classes = set(), [nnUNetTrainer]
    while classes:
        current = classes.pop()
        names.add(current.__name__)
        classes += current.__subclasses__()
    return names
