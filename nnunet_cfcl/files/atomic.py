"""Atomic writes, which a kill or a full disk cannot spoil, and a check that a folder can be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_cfcl.errors import UserError, foreign_errors_as

#: Error number of a failed write -> fix.
REFUSALS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "delete something, or have your quota raised",
    errno.EROFS: "choose another folder, or mount the disk writable",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}
OTHER_REFUSAL = "make the folder writable, or choose another folder"
#: Space that must be left for a failed write not to be blamed on the disk.
PROBE_BYTES = 1 << 20


class WriteError(UserError):
    """A file cannot be written; the message names the file and the reason."""


def replace_atomically(file: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` create a temporary file beside ``file``, force it to disk, then rename it to ``file``.

    Readers of ``file`` see the old content or the new content, also after a kill or a power cut. Only one process may
    write a file at a time. Nothing is replaced where ``write`` creates no file, or fails.

    Raises:
        WriteError: the disk is full or read-only; ``file`` is unchanged. Other errors of ``write`` are raised as they
            are.
    """
    target = Path(file)
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        with refusals_named(target, temporary):
            # a kill while writing leaves half a file, which must never be taken for a new one
            temporary.unlink(missing_ok=True)
            write(temporary)
            if temporary.exists():
                with open(temporary, "rb+") as handle:
                    os.fsync(handle.fileno())
                os.replace(temporary, target)
                _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def refusals_named(target: Path, temporary: Path) -> Iterator[None]:
    """Context in which ``target`` is written as ``temporary``; errors of the disk are told apart from all others.

    Libraries that write in C report only that they failed, and the data may be read from another disk meanwhile: in
    doubt the temporary file is extended a little, which fails for the same reason.

    Raises:
        WriteError: the disk cannot be written.
    """
    def translate(error: Exception) -> Exception:
        refusal = error if isinstance(error, OSError) and error.errno in REFUSALS else _refusal(temporary)
        if refusal is None:
            return error
        fix = REFUSALS.get(refusal.errno or 0, OTHER_REFUSAL)
        return WriteError(f"cannot write {target} ({refusal.strerror}); what was there before is as it was",
                          f"{fix}, then start again, a training with --c")

    with foreign_errors_as(translate):
        yield


def _refusal(temporary: Path) -> OSError | None:
    """Error of the disk when the file is extended; None: it can be extended."""
    try:
        with open(temporary, "ab") as handle:
            handle.write(bytes(PROBE_BYTES))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        return error
    return None


def _sync_folder(folder: Path) -> None:
    """Force the new name to disk as well, where the file system supports it (not on Windows)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text_atomically(file: str | os.PathLike[str], text: str) -> None:
    """`Path.write_text` in UTF-8, atomically; raises as `replace_atomically` does."""
    replace_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def backup_path(file: Path, mark: str) -> Path:
    """Free path for the backup of a file: ``MARK_NAME`` beside it, or ``MARK_2_NAME`` and so on."""
    kept = file.with_name(f"{mark}_{file.name}")
    numbers = count(2)
    while kept.exists():
        kept = file.with_name(f"{mark}_{next(numbers)}_{file.name}")
    return kept


def writable_folder(folder: str | os.PathLike[str], fix: str = "choose another folder") -> Path:
    """Create the folder if it is missing, and check that a file can be written in it.

    Raises:
        UserError: no file can be written there; the reason is named.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror})", fix) from error
    return Path(folder)
