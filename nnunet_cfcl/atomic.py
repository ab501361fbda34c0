"""Files that a kill cannot spoil: written under a temporary name, then renamed; folders that can be written at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_cfcl.errors import UserError


def replace_atomically(file: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``file``, force it to disk, then rename it to ``file``.

    Whoever reads ``file`` sees the old content or the new one, also after a kill or a power cut. Only one process may
    write a file at a time. Nothing is replaced where ``write`` makes no file, or fails.
    """
    target = Path(file)
    temporary = target.with_name(f"{target.name}.tmp")
    # a kill while writing leaves half a file, which must never be taken for a new one
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        if temporary.exists():
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(file: str | os.PathLike[str], text: str) -> None:
    """`Path.write_text` in UTF-8, atomically."""
    replace_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def writable_folder(folder: str | os.PathLike[str], mend: str = "choose another folder") -> Path:
    """The folder, made if it is not there, when a file can be written in it.

    Raises:
        UserError: it cannot, and why.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); {mend}") from error
    return Path(folder)
