"""No run hangs, and no process is lost in silence: what makes no progress is ended, with the stack of every process."""

from __future__ import annotations

import ctypes
import faulthandler
import inspect
import math
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess

from nnunet_cfcl.errors import UserError

LIMIT_VARIABLE = "nnUNet_cfcl_hang_minutes"
DEFAULT_MINUTES = 60.0
#: Makes a process write its stack; None where the system knows no such signals (Windows).
STACK_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
STDERR = 2
#: How long a process may take to write its stack, and a last line to reach the log.
SECONDS_FOR_A_STACK, SECONDS_FOR_LAST_WORDS = 0.3, 5.0
#: So much later than the watchdog, which may be writing stacks still, its backstop ends the process.
BACKSTOP_SECONDS = 60.0
#: Of Linux's prctl: the signal a process gets when its parent dies.
PR_SET_PDEATHSIG = 1

_LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]*)|exited unexpectedly)")


@contextmanager
def watched(what: str, say: Callable[[str], object] = print) -> Iterator[Callable[[], None]]:
    """Within the block the function that is given must be called every now and then, or the process is ended.

    A run of which nothing is heard for `LIMIT_VARIABLE` minutes waits for something that will not come: a dead disk, a
    lock. Its stack and those of its child processes are written to stderr, the children are killed, and the process
    exits with status 1; a raised error would wait with everything else. Time in which the whole process is stopped, as
    by a scheduler, does not count. Blocks may lie within each other: the innermost is watched, its end is progress.

    Args:
        what: is watched, for messages.
        say: told why the run is ended.

    Raises:
        UserError: a data loading process was killed; `LIMIT_VARIABLE` is no number of minutes.
    """
    limit = hang_seconds()
    dog = None if limit is None else _Watchdog(what, say, limit)
    try:
        yield beat
    except UserError as error:
        if not str(error).startswith("Caught "):
            raise
        # PyTorch's words about one of a data loading process: the traceback, then what it says to the user
        raise UserError(str(error).rpartition(f"{type(error).__name__}: ")[2].removesuffix("\\n")) from error
    except RuntimeError as error:
        if (lost := _lost_loader(error)) is None:
            raise
        raise UserError(f"{what}: {lost}") from error
    finally:
        if dog is not None:
            dog.stop()


def beat() -> None:
    """There is progress; does nothing where nobody watches."""
    if _dogs:
        _dogs[-1].silent = 0.0


def hang_seconds() -> float | None:
    """The limit in seconds; None: nothing is ended.

    Raises:
        UserError: the variable holds something else than a number of minutes, 0 or more.
    """
    text = os.environ.get(LIMIT_VARIABLE, "") or str(DEFAULT_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise UserError(f"{LIMIT_VARIABLE} must be the minutes without progress after which a run is ended, 0 for "
                        f"never, found '{text}'")
    return 60 * minutes or None


def show_stacks_when_asked(*ignored: object) -> None:
    """Called in a child process of a watched run: it writes its stack to stderr when the watchdog asks for it, also
    from within a library that never returns, and does not outlive the run (on Linux)."""
    _take_signal(chain=False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        # it died while this process was being started; a server that forks for it is another one
        if parent and multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent.pid:
            os._exit(1)


def show_stack_on_signal() -> None:
    """This process and those that it forks from now on write their stacks when `STACK_SIGNAL` asks for it; whatever the
    signal did before, it does afterwards."""
    _take_signal(chain=True)


def _take_signal(chain: bool) -> None:
    if STACK_SIGNAL is None:
        return
    # Given back first: faulthandler does not take a second time what it believes to have, though something else took it
    # meanwhile, as the compiler in Triton does. That goes on to be called afterwards if Python knows of it.
    faulthandler.unregister(STACK_SIGNAL)
    handler = signal.getsignal(STACK_SIGNAL)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(STACK_SIGNAL, handler)
    faulthandler.register(STACK_SIGNAL, STDERR, all_threads=True, chain=chain)


def how_they_died(processes: Iterable[BaseProcess]) -> str:
    """"pid 12 by SIGKILL, pid 13 with status 3": processes that are dead, other than by the SIGTERM that those are sent
    which a lost one leaves behind."""
    dead = [(one.pid, one.exitcode) for one in processes if one.exitcode not in (None, 0, -signal.SIGTERM)]
    return ", ".join(f"pid {pid} by {signal.Signals(-code).name}" if code < 0 else f"pid {pid} with status {code}"
                     for pid, code in dead if code is not None)


class _Watchdog(threading.Thread):
    """Counts the time since the last `beat`, while it is the innermost."""

    def __init__(self, what: str, say: Callable[[str], object], limit: float) -> None:
        super().__init__(daemon=True, name="watchdog")
        self._what, self._say, self._limit = what, say, limit
        self.silent, self._stopped = 0.0, threading.Event()
        # In the thread of the block, which is the one that forks data loading processes: one that is forked while a
        # process is being started keeps the starting from ever ending.
        self._backstop = None if _dogs else _Backstop(what, limit + BACKSTOP_SECONDS)
        _dogs.append(self)
        self.start()

    def stop(self) -> None:
        """The block has ended."""
        _dogs.remove(self)
        beat()
        self._stopped.set()
        # A thread that is left when Python ends, and frees a tensor then, takes the process down with an abort. It ends
        # at once, unless it is ending the process.
        self.join(SECONDS_FOR_LAST_WORDS)
        if self._backstop is not None:
            self._backstop.stop()

    def run(self) -> None:
        """Adds up short waits: a process that was stopped and goes on finds one of them longer, not many."""
        tick = min(1.0, self._limit / 10)
        while not self._stopped.wait(tick):
            if self._backstop is not None:
                self._backstop.hear()
            if _dogs[-1:] == [self]:
                self.silent += tick
            if self.silent > self._limit:
                self._end()

    def _end(self) -> None:
        _write(f"\n{self._what}: no progress for {self._limit / 60:g} minutes. The stacks of all processes:\n\n"
               f"Process {os.getpid()} (main):\n")
        faulthandler.dump_traceback(STDERR, all_threads=True)
        children = multiprocessing.active_children()
        for child in children:
            _show_stack(child)
        for child in children:
            child.kill()
        last = (f"{self._what}: ended, for there was no progress for {self._limit / 60:g} minutes ({LIMIT_VARIABLE} "
                "sets how many, 0: never); the stacks of all processes are on stderr. Look for a disk that does not "
                "answer; then start again, a training with --c")
        _briefly(lambda: self._say(last))
        _briefly(sys.stdout.flush)
        _write(f"{last}\n")
        os._exit(1)


_dogs: list[_Watchdog] = []


class _Backstop:
    """A small process that ends this one when its watchdog is silent: code that never returns and holds Python's lock,
    as some libraries do while they read, leaves no thread of Python a chance.

    faulthandler's timer would do that too, but its clock goes on while a scheduler has stopped the process.
    """

    def __init__(self, what: str, limit: float) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if STACK_SIGNAL is None:
            return
        show_stack_on_signal()
        words = (f"\n{what}: ended, for code outside of Python did not return for {limit / 60:g} minutes "
                 f"({LIMIT_VARIABLE}, 0: never). Look for a disk that does not answer; then start again, a training "
                 "with --c. The stack of the main process:\n\n")
        script = (f"import os, select, signal, time\n{_OUTLAST}\n"
                  f"_outlast({os.getpid()}, {limit}, {int(STACK_SIGNAL)}, {words!r})")
        # a system that allows no more processes: the watchdog is there
        with suppress(OSError):
            self._process = subprocess.Popen([sys.executable, "-I", "-S", "-c", script], stdin=subprocess.PIPE,
                                             stdout=subprocess.DEVNULL)

    def hear(self) -> None:
        """The watchdog is alive."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                os.write(self._process.stdin.fileno(), b".")

    def stop(self) -> None:
        """There is no watchdog any more."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # which waits for its end


def _outlast(pid: int, limit: float, stack_signal: int, words: str) -> None:
    """What the backstop's process does. Its source is all that process has: nothing else of this file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the other one
    tick, silent = min(1.0, limit / 10), 0.0
    while silent <= limit:
        if select.select([0], [], [], tick)[0]:
            if not os.read(0, 1 << 16):
                return
            silent = 0.0
        elif os.getppid() != pid:
            return
        else:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    stopped = file.read().rpartition(")")[2].split()[0] in ("T", "t")
            except OSError:  # a system without /proc
                stopped = False
            silent += 0 if stopped else tick
    # by another process: stderr may lie on the disk that does not answer
    writer = os.fork()
    if not writer:
        os.write(2, words.encode())
        os._exit(0)
    time.sleep(0.5)
    for number in (stack_signal, signal.SIGKILL):
        if os.getppid() == pid:  # the signal for the stack may have ended it
            os.kill(pid, number)
            time.sleep(1)
    os.kill(writer, signal.SIGKILL)


try:
    # as it is now: the file may be another one when a run of weeks asks for it
    _OUTLAST = inspect.getsource(_outlast)
except OSError:  # a package without its sources
    _OUTLAST = "def _outlast(*given): pass"


def _show_stack(child: BaseProcess) -> None:
    _write(f"\nProcess {child.pid} ({child.name}):\n")
    if STACK_SIGNAL is not None and child.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(child.pid, STACK_SIGNAL)
        time.sleep(SECONDS_FOR_A_STACK)


def _write(text: str) -> None:
    # past Python's buffers, whose locks may be what everything waits for
    with suppress(OSError):
        os.write(STDERR, text.encode())


def _briefly(work: Callable[[], object]) -> None:
    """Do something that may hang as well."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS_FOR_LAST_WORDS)


def _lost_loader(error: BaseException) -> str | None:
    """In words, when PyTorch says that a data loading process is no more; it says more in the error's cause."""
    texts = [str(one) for one in (error, error.__cause__) if one is not None]
    found = [match for text in texts if (match := _LOST.search(text))]
    if not found:
        return None
    how = next((match[1] for match in found if match[1]), None)
    name = next((one.name for one in signal.Signals if how and signal.strsignal(one) == how), how)
    died = f"a data loading process was killed by {name}" if how else "a data loading process exited"
    if name == "SIGKILL":
        died += ", most often because the memory is used up"
    if name == "SIGBUS":
        died += ", most often because shared memory (/dev/shm) is used up"
    return (f"{died} ({' '.join(texts[-1].split())}): load in fewer processes (nnUNet_n_proc_DA, 0 for none) or ask "
            "for more memory, then start again, a training with --c")
