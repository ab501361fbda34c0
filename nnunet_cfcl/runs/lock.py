"""One run at a time in a folder that several may want to fill."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from nnunet_cfcl.files.atomic import writable_folder
from nnunet_cfcl.runs.ranks import Ranks

if sys.platform != "win32":
    import fcntl

SECONDS_BETWEEN_TRIES = 5.0

#: Answers of a file system without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def exclusive(folder: Path, log: Callable[[str], None], ranks: Ranks = Ranks()) -> Iterator[None]:  # noqa: B008 - frozen
    """Holds the folder's lock within the block; a run that dies gives it back.

    Where the file system knows no locks, ``log`` is told so and nobody waits; on Windows nobody waits either.

    Args:
        folder: made if it is missing.
        log: told when another run holds the lock, and this one waits.
        ranks: the processes of this run; the first one holds the lock for all of them.

    Raises:
        UserError: the folder cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    file = ranks.main_first(lambda: _open(folder) if ranks.is_main else None)
    try:
        told = False
        # not one long wait: a rank that is kept waiting for the first one by torch.distributed gives up after minutes
        while not ranks.broadcast_object(file is not None and _locked(file, log)):
            if not told and ranks.is_main:
                log(f"Another run is at work in {folder}: waiting for it to finish.")
            told = True
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield
    finally:
        if file is not None:
            _close(file)


def _open(folder: Path) -> IO[str]:
    writable_folder(folder, "free some space there or make it writable, then start again")
    return open(folder / "lock", "w")


def _locked(file: IO[str], log: Callable[[str], None]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log(f"{file.name} cannot be locked ({error.strerror}): do not start a second run in this folder.")
    return True


def _close(file: IO[str]) -> None:
    # forked data loading processes may still hold the file, and with it the lock
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()
