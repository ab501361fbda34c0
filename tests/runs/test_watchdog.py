"""Processes that hang, raise or are killed: every run ends, and reports why."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.batches import batches
from nnunet_cfcl.runs.watchdog import LIMIT_VARIABLE, hang_seconds, watched
from nnunet_cfcl.runs.workers import PoolWorkers


class Images(Dataset[torch.Tensor]):
    """Images of which the fourth brings its fate on the process that loads it."""

    def __init__(self, fate: Callable[[], object]) -> None:
        self.fate = fate

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3:
            self.fate()
        return torch.tensor(index)


def load(fate: Callable[[], object]) -> None:
    """Load in two processes, as the pretraining does."""
    with watched("loading", lambda line: print("log:", line, flush=True)) as beat:
        for batch in batches(Images(fate), list(range(8)), 2, 2):
            beat()
            print("batch", batch.tolist(), flush=True)


def hangs() -> None:
    print("hangs in", os.getpid(), flush=True)
    time.sleep(10_000)


def raises() -> None:
    raise ZeroDivisionError("of this image")


def complains() -> None:
    raise UserError("case 'a' is broken", "correct it", ["first line", "second line"])


def complains_beside_another_process() -> None:
    """Complain as soon as the other process has written to the file that is everyone's output."""
    while not os.fstat(1).st_size:
        time.sleep(0.05)
    complains()


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_faulty() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def holds_the_lock_for_ever() -> None:
    """Hold Python's lock, as a library does that reads from a dead disk without releasing it."""
    with watched("reading"):
        ctypes.PyDLL(None).sleep(10_000)


def waits_within() -> None:
    """An inner block that ends well, then nothing."""
    with watched("the run"):
        with watched("its first part"):
            pass
        threading.Event().wait()


def waits_for_ever() -> None:
    with watched("waiting"):
        threading.Event().wait()


def _spoken(work: Callable[..., object], arguments: tuple[Any, ...], file: str, minutes: float) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    os.environ[LIMIT_VARIABLE] = str(minutes)
    try:
        work(*arguments)
    except UserError as error:
        sys.exit(f"UserError: {error}")


@pytest.fixture
def ended(tmp_path):
    """Factory: (function, its arguments, minutes without progress, status) -> output of a process that runs it until it
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


def test_a_hanging_data_loading_process_is_an_error_that_the_log_gets_too_and_is_ended(ended):
    output = ended(load, hangs, minutes=0.1)
    assert "batch [0, 1]" in output and "batch [2, 3]" not in output
    error = "loading: the data loading processes delivered nothing for 0.1 minutes"
    assert output.splitlines()[-1].startswith(f"UserError: {error}") and f"log: {error}" in output
    assert_gone(output)


def test_a_main_process_that_hangs_is_ended_with_its_stack(ended):
    output = ended(waits_for_ever, minutes=0.01)
    assert "Timeout (" in output and "in waits_for_ever" in output


@pytest.mark.skipif(sys.platform == "win32", reason="the C library is another one")
def test_a_process_that_waits_in_c_code_and_holds_pythons_lock_is_ended_with_its_stack(ended):
    assert "in holds_the_lock_for_ever" in ended(holds_the_lock_for_ever, minutes=0.01)


def test_after_the_end_of_an_inner_block_the_outer_one_is_watched_again(ended):
    assert "in waits_within" in ended(waits_within, minutes=0.01)


def test_a_data_loading_process_that_raises_shows_its_own_traceback(ended):
    output = ended(load, raises)
    assert "ZeroDivisionError: of this image" in output and "in raises" in output and "worker process 1" in output


def test_a_user_error_of_a_data_loading_process_is_raised_as_it_is(ended):
    output = ended(load, complains)
    assert output.splitlines()[-3:] == [
        "UserError: case 'a' is broken; fix: correct it", "  first line", "  second line"]
    assert "Traceback" not in output


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
def test_a_hanging_process_of_the_pool_ends_the_command_with_the_stack_of_its_main_process(ended):
    output = ended(work_on_a_pool, [hangs, hangs], minutes=0.3)
    assert "in work_on_a_pool" in output
    assert_gone(output)


def does_not_end() -> None:
    """Hang when the process, whose work is done, has to end."""
    Finalize(None, hangs, exitpriority=100)


@pytest.mark.end_to_end
def test_a_process_of_the_pool_that_does_not_end_ends_the_command(ended):
    output = ended(work_on_a_pool, [does_not_end], minutes=0.3)
    assert "in __exit__" in output and "in work_on_a_pool" in output
    assert_gone(output)


def test_the_error_of_one_process_of_the_pool_is_raised_though_another_one_never_returns(ended):
    output = ended(work_on_a_pool, [hangs, complains_beside_another_process])
    assert "UserError: case 'a' is broken; fix: correct it" in output
    assert_gone(output)


def test_a_slow_run_that_makes_progress_is_left_alone_and_other_errors_are_not_touched(monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.01")
    with watched("slow") as beat:
        for _ in range(20):
            time.sleep(0.03)
            beat()
    with watched("outer"), watched("inner"):
        for _ in range(20):
            time.sleep(0.1)
            beat()
    with pytest.raises(RuntimeError, match="^something else$"), watched("slow"):
        raise RuntimeError("something else")
    time.sleep(1)  # no block is watched any more


@pytest.mark.parametrize("text, seconds", [("", 3600), ("0", 0), ("1.5", 90)])
def test_the_limit_is_a_number_of_minutes(monkeypatch, text, seconds):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    assert hang_seconds() == seconds


@pytest.mark.parametrize("text", ["an hour", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_of_minutes_is_rejected(monkeypatch, text):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(UserError, match=f"{LIMIT_VARIABLE} must be the minutes.*found '{text}'"), watched("anything"):
        pass
