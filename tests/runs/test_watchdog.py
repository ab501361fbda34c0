"""Processes that hang, raise or are killed while they load data: every run ends, and says why."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.util import Finalize
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs import watchdog
from nnunet_cfcl.runs.batches import StepOrder, batches
from nnunet_cfcl.runs.watchdog import LIMIT_VARIABLE, hang_seconds, show_stack_on_signal, watched
from nnunet_cfcl.runs.workers import PoolWorkers


class Images(Dataset[torch.Tensor]):
    """Something happens to the process that loads the fourth of eight images."""

    def __init__(self, fate: Callable[[], object]) -> None:
        self.fate = fate

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3:
            self.fate()
        return torch.tensor(index)


def load(fate: Callable[[], object]) -> None:
    """In two processes, as the pretraining does."""
    dataset: Any = Images(fate)
    with watched("loading") as beat:
        for batch in batches(dataset, StepOrder(range(4), 2, range(2)), 2, 2):
            beat()
            print("batch", batch.tolist(), flush=True)


def hangs() -> None:
    print("hangs in", os.getpid(), flush=True)
    time.sleep(10_000)


def raises() -> None:
    raise ZeroDivisionError("of this image")


def complains() -> None:
    raise UserError("case 'a' is broken; mend it")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_faulty() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def holds_the_lock_for_ever() -> None:
    """As a library does that reads from a dead disk without letting go of Python's lock."""
    watchdog.BACKSTOP_SECONDS = 2.0
    with watched("reading"):
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(10_000)


def waits_within() -> None:
    """An inner block that ends well, then nothing."""
    with watched("the run"):
        with watched("its first part"):
            pass
        threading.Event().wait()


def forks_one_that_hangs() -> None:
    """As nnU-Net does before its epochs: nothing is called in the process."""
    show_stack_on_signal()
    multiprocessing.get_context("fork").Process(target=hangs, daemon=True).start()
    waits_for_ever()


def waits_for_ever() -> None:
    with watched("waiting"):
        threading.Event().wait()


def _spoken(work: Callable[..., object], arguments: tuple[Any, ...], file: str, minutes: float) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    os.environ[LIMIT_VARIABLE] = str(minutes)
    # as in a new process: Triton, which other tests load, takes the signal and lives on
    faulthandler.unregister(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        work(*arguments)
    except UserError as error:
        sys.exit(f"UserError: {error}")


@pytest.fixture
def ended(tmp_path):
    """Factory: (function, its arguments, minutes without progress, status) -> what a process that runs it says until it
    ends with that status."""

    def run(work: Callable[..., object], *arguments: Any, minutes: float = 1.5, status: int = 1) -> str:
        file = tmp_path / "output"
        process = multiprocessing.get_context("fork").Process(
            target=_spoken, args=(work, arguments, str(file), minutes))
        process.start()
        process.join(100)
        process.kill()
        process.join()
        assert process.exitcode == status, file.read_text()
        return file.read_text()

    return run


def assert_gone(output: str) -> None:
    """The process that said it hangs."""
    pid = int(output.split("hangs in ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)


def test_a_hanging_data_loading_process_ends_the_run_its_stack_is_shown_and_nothing_is_left(ended):
    output = ended(load, hangs, minutes=0.25)
    assert "batch [0, 1]" in output and "batch [2, 3]" not in output
    assert "loading: ended, for there was no progress for 0.25 minutes" in output
    main, *workers = output.split("Process ")[1:]
    assert "(main)" in main and "in load" in main
    assert len(workers) == 2 and sum("in hangs" in stack for stack in workers) == 1, output
    assert_gone(output)


def test_a_main_process_that_hangs_is_ended_too(ended):
    output = ended(waits_for_ever, minutes=0.01)
    assert "in waits_for_ever" in output and "start again" in output


def test_the_stack_of_a_process_that_was_forked_before_is_shown_too(ended):
    output = ended(forks_one_that_hangs, minutes=0.05)
    main, worker = output.split("Process ")[1:]
    assert "in waits_for_ever" in main and "in hangs" in worker
    assert_gone(output)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_waits_in_foreign_code_and_holds_pythons_lock_is_ended_too(ended):
    output = ended(holds_the_lock_for_ever, minutes=0.02, status=-signal.SIGUSR1)
    assert "reading: ended, for code outside of Python did not return for" in output
    assert "in holds_the_lock_for_ever" in output, output


def load_and_hold_the_lock() -> None:
    """While a data loading process hangs."""
    watchdog.BACKSTOP_SECONDS = 2.0
    dataset: Any = Images(hangs)
    with watched("loading"):
        stream = batches(dataset, StepOrder(range(4), 2, range(2)), 2, 2)
        next(stream)
        time.sleep(1)
        ctypes.PyDLL(None).sleep(10_000)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_no_data_loading_process_outlives_a_run_that_is_ended_from_outside(ended):
    assert_gone(ended(load_and_hold_the_lock, minutes=0.05, status=-signal.SIGUSR1))


def test_after_the_end_of_an_inner_block_the_outer_one_is_watched_again(ended):
    output = ended(waits_within, minutes=0.01)
    assert "the run: ended, for there was no progress" in output and "its first part" not in output


def test_a_data_loading_process_that_raises_shows_its_own_traceback(ended):
    output = ended(load, raises)
    assert "ZeroDivisionError: of this image" in output and "in raises" in output and "worker process 1" in output


def test_what_a_data_loading_process_has_to_say_to_the_user_is_one_line(ended):
    assert ended(load, complains).splitlines()[-1] == "UserError: case 'a' is broken; mend it"


@pytest.mark.parametrize("fate, name, words", [
    (is_killed, "SIGKILL", "most often because the memory is used up"), (is_faulty, "SIGSEGV", "fewer processes")])
def test_a_data_loading_process_that_is_killed_is_named_with_the_signal(ended, fate, name, words):
    last = ended(load, fate).splitlines()[-1]
    assert last.startswith(f"UserError: loading: a data loading process was killed by {name}"), last
    assert words in last and "nnUNet_n_proc_DA" in last


def _meet(nothing: None) -> Callable[[Callable[[], object]], object]:
    return _call


def _call(fate: Callable[[], object]) -> None:
    fate()


def work_on_a_pool(fates: list[Callable[[], object]]) -> None:
    with PoolWorkers(None, 2) as workers:
        list(workers.each(_meet, fates, "preprocessing"))


@pytest.mark.end_to_end
def test_a_hanging_process_of_the_pool_ends_the_command_with_its_stack(ended):
    output = ended(work_on_a_pool, [hangs, hangs], minutes=0.5)
    assert "preprocessing: ended, for there was no progress" in output and output.count("in hangs\n") == 2, output


def does_not_end() -> None:
    """Its work is done, but the process hangs when it is asked to end."""
    Finalize(None, hangs, exitpriority=100)


@pytest.mark.end_to_end
def test_a_process_of_the_pool_that_does_not_end_ends_the_command_with_its_stack(ended):
    output = ended(work_on_a_pool, [does_not_end], minutes=0.5)
    assert "ending the processes of a pool: ended, for there was no progress" in output
    assert output.count("in hangs\n") == 1, output
    assert_gone(output)


def test_the_error_of_one_process_of_the_pool_is_seen_though_another_one_never_returns(ended):
    output = ended(work_on_a_pool, [hangs, complains])
    assert output.splitlines()[-1] == "UserError: case 'a' is broken; mend it"
    assert_gone(output)


def test_a_killed_process_of_the_pool_is_an_error_though_another_one_never_returns(ended):
    last = ended(work_on_a_pool, [hangs, is_killed]).splitlines()[-1]
    assert last.startswith("UserError: a process was killed, probably for lack of memory (pid"), last


def work_on_a_pool_that_waits_already(fates: list[Callable[[], object]]) -> None:
    """The executor's thread waits, as it may, when another process is started: it does not look at that one."""
    start = ProcessPoolExecutor._adjust_process_count  # type: ignore[attr-defined]

    def start_late(executor: ProcessPoolExecutor) -> None:
        time.sleep(1)
        start(executor)

    ProcessPoolExecutor._adjust_process_count = start_late  # type: ignore[attr-defined]
    work_on_a_pool(fates)


def test_a_killed_process_of_the_pool_that_the_executor_does_not_see_is_an_error(ended):
    last = ended(work_on_a_pool_that_waits_already, [hangs, is_killed]).splitlines()[-1]
    assert last.startswith("UserError: a process was killed, probably for lack of memory (pid"), last


def test_a_slow_run_that_makes_progress_is_left_alone_and_other_errors_are_not_touched(monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.01")
    with watched("slow") as beat:
        for _ in range(20):
            time.sleep(0.03)
            beat()
    with watched("outer"), watched("inner"):
        for _ in range(20):
            time.sleep(0.1)
            watchdog.beat()
    with pytest.raises(RuntimeError, match="^something else$"), watched("slow"):
        raise RuntimeError("something else")
    time.sleep(1)  # nothing is watched any more


def test_nothing_of_a_watched_block_is_left_when_it_has_ended(monkeypatch):
    """Python ends threads that are left at its own end, which aborts the process if one frees a tensor just then."""
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    run = watchdog._Watchdog.run

    def run_late(dog: watchdog._Watchdog) -> None:
        run(dog)
        time.sleep(0.5)

    monkeypatch.setattr(watchdog._Watchdog, "run", run_late)
    with watched("a block"), watched("an inner one"):
        busy = [one for one in threading.enumerate() if one.name == "watchdog"]
        backstop = watchdog._dogs[0]._backstop
        assert len(busy) == 2 and watchdog._dogs[1]._backstop is None
    assert not any(one.is_alive() for one in busy)
    assert backstop is not None and backstop._process is not None and backstop._process.returncode is not None


def test_a_watchdog_starts_no_process_beside_the_block(monkeypatch):
    """A data loading process that the block forks meanwhile would hold a pipe for whose end the starting waits."""
    threads, start = [], subprocess.Popen

    def noted(*given: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return start(*given, **options)

    monkeypatch.setattr(watchdog.subprocess, "Popen", noted)
    monkeypatch.setenv(LIMIT_VARIABLE, str(2 / 60))  # looked at every 0.2 s
    with watched("a block") as beat:
        for _ in range(5):
            time.sleep(0.1)
            beat()
    assert threads == [threading.current_thread()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_run_whose_words_nobody_reads_is_ended_too():
    """stderr is a full pipe: whoever writes to it hangs."""
    script = ("import os, time\nfrom nnunet_cfcl.runs import watchdog\nwatchdog.BACKSTOP_SECONDS = 1\n"
              "os.set_blocking(2, False)\ntry:\n    while os.write(2, bytes(4096)): pass\n"
              "except BlockingIOError: pass\n"
              "os.set_blocking(2, True)\nwith watchdog.watched('unread'):\n    time.sleep(1000)\n")
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, LIMIT_VARIABLE: "0.02"},
                               stderr=subprocess.PIPE)
    try:
        assert process.wait(timeout=60) in (-signal.SIGKILL, -int(watchdog.STACK_SIGNAL or 0))
    finally:
        process.kill()
        assert process.stderr is not None
        process.stderr.close()


ORPHAN = """
import multiprocessing, os, sys, time
def begin():
    from nnunet_cfcl.runs.watchdog import show_stacks_when_asked
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.05)
    show_stacks_when_asked()
    print("went on", flush=True)
if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=begin)
    child.start()
    time.sleep(5)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_whose_parent_dies_while_it_is_being_started_ends(tmp_path, method):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    # the end of the output is that of the last process that holds it
    done = subprocess.run([sys.executable, str(tmp_path / "orphan.py"), method], stdout=subprocess.PIPE, text=True,
                          timeout=60)
    assert done.returncode == -signal.SIGKILL and done.stdout == ""


TAKEN = """
import os, signal, time
from nnunet_cfcl.runs.watchdog import show_stack_on_signal
show_stack_on_signal()
signal.signal(signal.SIGUSR1, lambda *given: print("called", flush=True))
show_stack_on_signal()
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.1)
print("lives", flush=True)
"""


@pytest.mark.skipif(watchdog.STACK_SIGNAL is None, reason="the system has no such signal")
def test_a_signal_that_something_else_has_taken_meanwhile_is_taken_again_and_the_other_is_called_too():
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, timeout=60)
    assert done.stdout == "called\nlives\n" and "most recent call first" in done.stderr, done.stderr


def test_time_in_which_the_process_is_stopped_does_not_count():
    script = ("import time\nfrom nnunet_cfcl.runs import watchdog\nfrom nnunet_cfcl.runs.watchdog import watched\n"
              "watchdog.BACKSTOP_SECONDS = 0.5\n"
              "with watched('stopped') as beat:\n    for number in range(8):\n        time.sleep(0.25)\n"
              "        beat()\n        print(number, flush=True)\nprint('done')\n")
    environment = {**os.environ, LIMIT_VARIABLE: "0.04"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE)
    # its second process looks as well by now
    assert process.stdout is not None and [process.stdout.readline() for _ in range(4)][-1] == "3\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "4\n5\n6\n7\ndone\n" and process.returncode == 0


@pytest.mark.parametrize("text, seconds", [("", 3600), ("0", None), ("1.5", 90)])
def test_the_limit_is_a_number_of_minutes(monkeypatch, text, seconds):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    assert hang_seconds() == seconds


@pytest.mark.parametrize("text", ["an hour", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(UserError, match=f"{LIMIT_VARIABLE} must be the minutes.*found '{text}'"), watched("anything"):
        pass
