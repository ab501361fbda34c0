"""Files that a kill or a full disk cannot spoil: written under a temporary name, then renamed; folders that can be
written at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_cfcl.errors import UserError, foreign_errors_as

#: What the operating system answers to nobody but those who write -> what mends it.
REFUSALS = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "your quota is used up: delete something, or have it raised",
    errno.EROFS: "it is mounted read-only: choose another folder, or mount it writable",
    errno.EFBIG: "files may not become so large there: raise the limit (ulimit -f)",
}
OTHER_REFUSAL = "make the folder writable, or choose another one"
#: So much more must fit for a write not to have failed for lack of space.
PROBE_BYTES = 1 << 20


class WriteError(UserError):
    """A file cannot be written; the message names it, why, and what mends that."""


def replace_atomically(file: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``file``, force it to disk, then rename it to ``file``.

    Whoever reads ``file`` sees the old content or the new one, also after a kill or a power cut. Only one process may
    write a file at a time. Nothing is replaced where ``write`` makes no file, or fails.

    Raises:
        WriteError: the disk is full or read-only; ``file`` is as it was. What else goes wrong in ``write`` is raised as
            it is.
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
    """Within the block ``target`` is written as ``temporary``; a disk that refuses is told from all other errors.

    Libraries that write in C say no more than that they failed, and what is written may be read from another disk
    meanwhile: where it is not certain, the temporary file is made a little longer, which fails for the same reason.

    Raises:
        WriteError: the disk refuses.
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
    """What the disk answers when the file becomes longer."""
    try:
        with open(temporary, "ab") as handle:
            handle.write(bytes(PROBE_BYTES))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        return error
    return None


def _sync_folder(folder: Path) -> None:
    """The new name is on disk too; not on Windows and file systems that know no such thing."""
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
    """Where a file is kept that is written anew: ``MARK_NAME`` beside it, or ``MARK_2_NAME`` and so on."""
    kept = file.with_name(f"{mark}_{file.name}")
    numbers = count(2)
    while kept.exists():
        kept = file.with_name(f"{mark}_{next(numbers)}_{file.name}")
    return kept


def writable_folder(folder: str | os.PathLike[str], fix: str = "choose another folder") -> Path:
    """The folder, made if it is not there, when a file can be written in it.

    Raises:
        UserError: it cannot, and why.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror})", fix) from error
    return Path(folder)
