"""Lock of a folder: several runs may need its content, one at a time creates it."""

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

#: Error numbers of file systems without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def exclusive(folder: Path, log: Callable[[str], None], ranks: Ranks = Ranks()) -> Iterator[None]:  # noqa: B008 - frozen
    """Context that holds the lock of a folder; the lock of a run that dies is released.

    On a file system without locks, which is logged, and on Windows no run waits for another.

    Args:
        folder: the folder, created if it is missing.
        log: reports that another run holds the lock and this one waits.
        ranks: the processes of this run; the main rank holds the lock for all of them.

    Raises:
        UserError: the folder cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    file = ranks.main_first(lambda: _open(folder) if ranks.is_main else None)
    try:
        reported = False
        # not one long wait: torch.distributed gives up after minutes on a rank that waits for the main rank
        while not ranks.broadcast_object(file is not None and _locked(file, log)):
            if not reported and ranks.is_main:
                log(f"Another run is writing to {folder}: waiting for it to finish.")
            reported = True
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
        log(f"{file.name} cannot be locked ({error.strerror}): do not start a second run that uses this folder.")
    return True


def _close(file: IO[str]) -> None:
    # forked data loading processes may still hold the file, and with it the lock
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()
