"""Replacement of a whole folder, which a kill cannot leave half replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nnunet_cfcl.errors import UserError


def restored(folder: Path) -> Path:
    """The same folder, put back where a kill came between the two renamings of `swap_in`."""
    if not folder.exists() and _former(folder).is_dir():
        os.replace(_former(folder), folder)
    return folder


def swap_in(new: Path, folder: Path) -> None:
    """Force the files of a folder to disk, then put it in the place of another, existing or not, which is removed.

    Args:
        new: folder beside ``folder``, which is renamed.
        folder: folder that is replaced.

    Raises:
        UserError: a folder cannot be renamed.
    """
    try:
        for file in new.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(_former(folder), ignore_errors=True)
        if folder.is_dir():
            os.replace(folder, _former(folder))
        os.replace(new, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be replaced by {new} ({error.strerror})",
                        f"make {folder.parent} writable, then run the command again") from error
    shutil.rmtree(_former(folder), ignore_errors=True)


def link_or_copy(file: Path, target: Path) -> None:
    """Give a file a second name, or make a copy with its time where the file system has no links; replaces ``target``,
    and does nothing for a missing file."""
    target.unlink(missing_ok=True)
    if not file.is_file():
        return
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def _former(folder: Path) -> Path:
    """The name of a folder while another takes its place."""
    return folder.with_name(f"{folder.name}.old")
