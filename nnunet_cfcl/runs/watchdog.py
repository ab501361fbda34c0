"""End a process that makes no progress, and name data loading processes that died or hang."""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nnunet_cfcl.errors import UserError

LIMIT_VARIABLE = "nnUNet_cfcl_hang_minutes"
DEFAULT_MINUTES = 60.0
#: Patience beyond the limit: the timeout of a data loader, whose error has a cause and a fix, comes first.
PATIENCE = 1.1
STDERR = 2

#: PyTorch's texts about data loading processes; it has no exception classes for them.
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]*)|exited unexpectedly)")
_TIMED_OUT = re.compile(r"DataLoader timed out after \d")
_LIKELY_CAUSES = {"SIGKILL": ", most often because the memory is used up",
                  "SIGBUS": ", most often because shared memory (/dev/shm) is used up"}

#: Limits in seconds of the blocks that are open, from the outermost to the innermost; 0: no limit.
_limits: list[float] = []
# faulthandler's thread does not survive a fork: in the child a beat would wait for it for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_limits.clear)


@contextmanager
def watched(what: str, log: Callable[[str], object] | None = None) -> Iterator[Callable[[], None]]:
    """End the process, with status 1, if the function that the block gets is not called for `hang_seconds`.

    The Python stacks of all threads are then written to stderr. Blocks may be nested: beginning and end of a block
    count as progress.

    Args:
        what: name of the work, for messages.
        log: receives the error of a data loading process that died or hangs, before it is raised.

    Raises:
        UserError: a data loading process died, or delivered nothing for too long; `LIMIT_VARIABLE` is not a number of
            minutes.
    """
    _limits.append(hang_seconds())
    beat()
    try:
        yield beat
    except RuntimeError as error:
        failure = _loader_failure(what, error)
        if failure is None:
            raise
        if log is not None:
            log(str(failure))
        raise failure from error
    finally:
        _limits.pop()
        faulthandler.cancel_dump_traceback_later()
        beat()


def beat() -> None:
    """Report progress: the time without progress begins anew. Does nothing outside of `watched`."""
    if _limits and _limits[-1]:
        faulthandler.dump_traceback_later(PATIENCE * _limits[-1], exit=True, file=STDERR)


def hang_seconds() -> float:
    """Return the longest time without progress, in seconds; 0: unlimited.

    Raises:
        UserError: the environment variable holds something else than a number of minutes, 0 or more.
    """
    text = os.environ.get(LIMIT_VARIABLE, "") or str(DEFAULT_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise UserError(f"{LIMIT_VARIABLE} must be the minutes without progress after which a run is ended, 0 for "
                        f"never, found '{text}'")
    return 60 * minutes


def _loader_failure(what: str, error: RuntimeError) -> UserError | None:
    """Translate PyTorch's error about a data loading process; None: the error is about something else."""
    # which signal it was may stand in the cause alone
    texts = [str(one) for one in (error, error.__cause__) if one is not None]
    if _TIMED_OUT.match(texts[0]):
        return UserError(f"{what}: the data loading processes delivered nothing for {hang_seconds() / 60:g} minutes "
                         f"({LIMIT_VARIABLE}, 0: wait for ever)", "look for a disk that does not answer, then start "
                         "again, a training with --c")
    found = [match for text in texts if (match := _DIED.search(text))]
    if not found:
        return None
    how = next((match[1] for match in found if match[1]), None)
    name = next((one.name for one in signal.Signals if how and signal.strsignal(one) == how), how)
    died = f"was killed by {name}{_LIKELY_CAUSES.get(name, '')}" if name else "exited"
    return UserError(f"{what}: a data loading process {died} ({' '.join(texts[-1].split())})",
                     "load in fewer processes (nnUNet_n_proc_DA, 0 for none) or ask for more memory, then start again, "
                     "a training with --c")
