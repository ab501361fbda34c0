"""Only one run at a time fills a folder; a run that dies or a file system without locks stops no other run."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs import lock
from nnunet_cfcl.runs.lock import exclusive
from tests.runs.crew import Crew

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_TRIES", 0.05)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock, and the folder."""
    folder = tmp_path / "shared"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder / "lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process, folder
    process.kill()
    process.wait()
    process.stdout.close()


def is_free(folder) -> bool:
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_free_folder_is_made_and_locked_at_once_and_given_back(tmp_path):
    lines = []
    with exclusive(tmp_path / "new" / "folder", lines.append):
        assert not is_free(tmp_path / "new" / "folder")
    assert is_free(tmp_path / "new" / "folder") and not lines


def test_an_error_within_gives_the_lock_back(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path, print):
        raise KeyError
    assert is_free(tmp_path)


def test_a_second_run_logs_once_that_it_waits_and_continues_when_the_first_one_dies(holder):
    process, folder = holder
    lines, entered = [], threading.Event()

    def second_run() -> None:
        with exclusive(folder, lines.append):
            entered.set()

    waiting = threading.Thread(target=second_run)
    waiting.start()
    assert not entered.wait(0.5)
    assert lines == [f"Another run is writing to {folder}: waiting for it to finish."]
    process.send_signal(signal.SIGKILL)
    assert entered.wait(10)
    waiting.join()
    assert len(lines) == 1


def test_a_forked_process_that_lives_on_does_not_keep_the_lock(tmp_path):
    with exclusive(tmp_path, print):
        child = os.fork()
        if child == 0:  # as a data loading process has it, the file stays open here
            time.sleep(60)
            os._exit(0)
    try:
        assert is_free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks_no_run_waits_which_is_logged(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    lines = []
    with exclusive(tmp_path, lines.append):
        assert len(lines) == 1 and "cannot be locked (No locks available)" in lines[0]


def test_another_failure_of_the_file_system_is_not_taken_for_a_missing_lock(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), exclusive(tmp_path, print):
        pass


def test_a_folder_that_cannot_be_written_is_named_with_what_mends_it(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "sub"
    rejected = pytest.raises(UserError, match="cannot write .*file/sub .Not a directory.; free some space")
    with rejected, exclusive(folder, print):
        pass


def test_all_processes_of_a_run_wait_with_the_first_one(holder, tmp_path):
    """Without a long wait inside of torch.distributed, which would end them."""
    process, folder = holder
    crew = Crew(2, tmp_path)
    try:
        crew(_here)  # on a busy machine the processes may need longer to start than the lock is held
        release = threading.Timer(1.0, process.kill)
        release.start()
        (first_free, first_lines), (second_free, second_lines) = crew(enter, folder)
    finally:
        crew.close()
    assert not first_free and not second_free
    assert len(first_lines) == 1 and second_lines == []


def _here(ranks):
    return ranks.rank


def enter(ranks, folder):
    lock.SECONDS_BETWEEN_TRIES = 0.05
    lines: list[str] = []
    with exclusive(folder, lines.append, ranks):
        free = is_free(folder)
        ranks.wait()
    return free, lines
