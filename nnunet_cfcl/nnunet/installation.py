"""Registration of the trainers with nnU-Net: the drop-in folder, or a shim inside an nnU-Net installation.

nnU-Net looks a trainer up in its own folder ``training/nnUNetTrainer`` first, then in the folders named by
``nnUNet_extTrainer`` (``nnunetv2.utilities.find_objects``). The variable is preferred; the shim is for installations
where it cannot be set, and for nnU-Net before 2.8, which does not read it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import nnunet_cfcl
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import write_text_atomically

EXPORT_COMMAND = "export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)"
#: For nnU-Net before 2.8, which does not read the variable.
INSTALL_COMMAND = "nnunet_cfcl install"
SHIM_FOLDER = "nnunet_cfcl_plugin"

_PACKAGE_SOURCE = '"""Written by `nnunet_cfcl install` {version}; `nnunet_cfcl uninstall` removes this folder."""\n'
_SHIM_SOURCE = '''"""Offers the trainers of the installed package nnunet_cfcl to nnU-Net's look-up.

The package is imported only when one of its trainers is requested: a broken package does not affect stock nnU-Net.
"""

import sys

TRAINERS = {trainers}


def __getattr__(name):
    if name not in TRAINERS:
        raise AttributeError(name)
    try:
        import nnunet_cfcl
    except ModuleNotFoundError:
        print(f"{{name}} belongs to nnunet_cfcl, which is not installed here any more: install it again, or remove "
              f"the folder {{__file__.rpartition('trainer_shim')[0]}}", file=sys.stderr)
        raise AttributeError(name) from None
    import nnunet_cfcl.trainers
    from nnunet_cfcl.chromap.nnunet.hook import offer_chromaps
    offer_chromaps()
    return getattr(nnunet_cfcl.trainers, name)
'''


def trainers_path() -> Path:
    """The folder for ``nnUNet_extTrainer``, in an editable installation as in a wheel.

    Raises:
        UserError: the package is not installed (only its source folder is importable).
    """
    spec = importlib.util.find_spec("nnunet_cfcl._dropin")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{Path(nnunet_cfcl.__file__).parent} is importable but not installed, so that its drop-in "
                        "folder cannot be found", "pip install -e . in the checkout")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def shim_folder() -> Path:
    """Path of the shim in the nnU-Net installation of this interpreter, whether it exists or not.

    Raises:
        UserError: nnU-Net is not installed, or lacks the folder that the supported versions keep their trainers in.
    """
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("nnU-Net is not installed in this Python environment", "pip install nnunetv2")
    variants = Path(next(iter(spec.submodule_search_locations))) / "training" / "nnUNetTrainer" / "variants"
    if not variants.is_dir():
        raise UserError(f"this nnU-Net has no folder {variants} for the shim", f"{EXPORT_COMMAND}, which needs no shim")
    return variants / SHIM_FOLDER


def install(trainers: Sequence[str]) -> Path:
    """Write or update the shim in the nnU-Net installation.

    Args:
        trainers: names of the trainers that the shim offers.

    Returns:
        Folder of the shim.

    Raises:
        UserError: nnU-Net is not installed, or its folder is not writable.
    """
    folder = shim_folder()
    files = _shim_files(trainers)
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            write_text_atomically(folder / name, text)
    except OSError as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"cannot write {folder} ({error.strerror})", "run this as the owner of the installation, or "
                        f"{_command_without_install()}") from error
    return folder


def _command_without_install() -> str:
    from nnunet_cfcl.nnunet.compatibility import reads_external_trainers

    return EXPORT_COMMAND if reads_external_trainers() else f"install nnunetv2 2.8 or newer and {EXPORT_COMMAND}"


def uninstall() -> Path | None:
    """Remove the shim and its byte code.

    Returns:
        The folder removed; None if there was none.

    Raises:
        UserError: the folder holds files that `install` did not write, or is not writable.
    """
    folder = shim_folder()
    if not folder.exists():
        return None
    ours = (*_SHIM_NAMES, "__pycache__")
    foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(ours))
    if foreign:
        raise UserError(f"{folder} also holds {', '.join(foreign)}, not written by nnunet_cfcl",
                        "move these files elsewhere first")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"cannot remove {folder} ({error.strerror})",
                        "run this as the owner of the installation") from error
    return folder


_SHIM_NAMES = ("__init__.py", "trainer_shim.py")


def _shim_files(trainers: Sequence[str]) -> dict[str, str]:
    sources = _PACKAGE_SOURCE.format(version=nnunet_cfcl.__version__), _SHIM_SOURCE.format(trainers=tuple(trainers))
    return dict(zip(_SHIM_NAMES, sources))
