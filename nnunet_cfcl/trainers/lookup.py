"""Look-up of trainers by name, as ``nnUNetv2_train -tr NAME`` does it."""

from __future__ import annotations

import difflib
import os
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl import trainers
from nnunet_cfcl.errors import CheckResult, UserError, isolated
from nnunet_cfcl.nnunet.compatibility import reads_external_trainers
from nnunet_cfcl.nnunet.installation import EXPORT_COMMAND, INSTALL_COMMAND
from nnunet_cfcl.nnunet.lookup import look_up_trainer


def plugin_trainers() -> tuple[str, ...]:
    """Names of the package's trainers that ``nnUNetv2_train -tr`` accepts."""
    classes = {name: getattr(trainers, name) for name in trainers.__all__}
    return tuple(sorted(name for name, found in classes.items() if issubclass(found, nnUNetTrainer)))


def known_trainer(name: str) -> type[nnUNetTrainer] | None:
    """Find a trainer's class; None if there is none, which `check_trainer` reports.

    The package's own trainers are found even where nnU-Net does not find them.
    """
    found: type[nnUNetTrainer] | None = None
    with isolated():  # `check_trainer` reports any failure of the look-up
        found = getattr(trainers, name) if name in plugin_trainers() else look_up_trainer(name)
    return found


def pretraining_trainer(name: str) -> type[nnUNetTrainer] | None:
    """`known_trainer` if it has a pretraining phase, else None."""
    found = known_trainer(name)
    return found if found is not None and issubclass(found, trainers.CounterfactualPretraining) else None


def find_trainer(name: str) -> Any:
    """Find the class that ``-tr`` names.

    Raises:
        UserError: nnU-Net finds no such trainer, or it has no pretraining phase.
    """
    found = pretraining_trainer(name)
    if found is None:
        check_trainer(name).raise_on_failure()
        raise UserError(f"{name} has no pretraining phase", "use one of the plugin's trainers (listed by `nnunet_cfcl "
                        "trainers`), or derive your trainer from CounterfactualPretraining too")
    return found


def check_trainer(name: str) -> CheckResult:
    """Check that nnU-Net's own look-up finds the trainer, as ``nnUNetv2_train -tr`` does."""
    try:
        found = look_up_trainer(name)
    except AssertionError:
        return CheckResult("FAIL", f"{name} was found, but is not an nnU-Net trainer",
                           "derive the class from nnUNetTrainer")
    if found is not None:
        return CheckResult("ok", f"trainer {name} found ({found.__module__})")
    missing = [path for path in _external_folders() if not os.path.exists(path)]
    reason = f" (nnUNet_extTrainer names {', '.join(missing)}, which does not exist)" if missing else ""
    return CheckResult("FAIL", f"nnU-Net finds no trainer {name}{reason}", _fix_for(name))


def _fix_for(name: str) -> str:
    """The command that registers ``name`` if it is the plugin's, else the closest existing name."""
    ours = plugin_trainers()
    if name in ours:
        return _registration_command()
    near = difflib.get_close_matches(name, {*_known_trainers(), *ours}, n=1, cutoff=0.0)[0]
    is_unregistered = near in ours and look_up_trainer(near) is None
    return f"-tr {near}" + (f", after {_registration_command()}" if is_unregistered else "")


def _external_folders() -> list[str]:
    return [path for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path.strip()]


def _registration_command() -> str:
    """The command that adds the plugin's folder to the variable, or installs the shim where it is not read."""
    if not reads_external_trainers():
        return INSTALL_COMMAND
    kept = "".join(path + os.pathsep for path in _external_folders() if os.path.exists(path))
    return EXPORT_COMMAND.replace("=", f"={kept}", 1)


def _known_trainers() -> set[str]:
    """Names of all trainer classes imported so far; a look-up without a match has imported every module."""
    names, classes = set(), [nnUNetTrainer]
    while classes:
        current = classes.pop()
        names.add(current.__name__)
        classes += current.__subclasses__()
    return names
