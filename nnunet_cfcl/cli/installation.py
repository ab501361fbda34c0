"""The verbs ``nnunet_cfcl trainers-path``, ``install`` and ``uninstall``."""

from __future__ import annotations

import argparse
from typing import Any

from nnunet_cfcl.nnunet.installation import EXPORT_COMMAND, install, trainers_path, uninstall


def add_trainers_path_parser(subparsers: Any) -> None:
    """Add the verb `trainers-path`, which prints only the drop-in folder on stdout."""
    parser = subparsers.add_parser(
        "trainers-path", help="print the folder for nnUNet_extTrainer", description=f"Use: {EXPORT_COMMAND}")
    parser.set_defaults(run=_run_trainers_path)


def add_install_parser(subparsers: Any) -> None:
    """Add the verb `install`."""
    parser = subparsers.add_parser(
        "install", help="install the trainers into this nnU-Net installation",
        description="Writes a shim into the nnU-Net installation of this Python environment, for use where "
                    "nnUNet_extTrainer cannot be set. `nnunet_cfcl uninstall` removes it.")
    parser.set_defaults(run=_run_install)


def add_uninstall_parser(subparsers: Any) -> None:
    """Add the verb `uninstall`."""
    parser = subparsers.add_parser("uninstall", help="remove the trainers from this nnU-Net installation",
                                   description="Removes the shim that `nnunet_cfcl install` wrote.")
    parser.set_defaults(run=_run_uninstall)


def _run_trainers_path(arguments: argparse.Namespace) -> int:
    print(trainers_path())
    return 0


def _run_install(arguments: argparse.Namespace) -> int:
    from nnunet_cfcl.trainers.lookup import plugin_trainers

    folder = install(plugin_trainers())
    print(f"nnU-Net now finds {', '.join(plugin_trainers())} (wrote {folder})")
    return 0


def _run_uninstall(arguments: argparse.Namespace) -> int:
    folder = uninstall()
    print(f"removed {folder}" if folder else "nothing to remove: the trainers are not installed in this nnU-Net")
    return 0
