"""Commands killed with SIGKILL at random moments of their phases, and what is compared in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.end_to_end.conftest import NnUNet

#: Names a file for the record of what was killed, of which a table can be made.
RECORD_VARIABLE = "CFCL_FAULT_RECORD"
LONGEST_S = 1800


@dataclass(frozen=True)
class Phase:
    """A part of a command.

    Attributes:
        name: for the record.
        command: as it is typed first.
        again: as it is typed after a kill.
        begins, ends: what the command says at the phase's beginning and end; "" are those of the command.
    """

    name: str
    command: Sequence[str]
    again: Sequence[str]
    begins: str = ""
    ends: str = ""


@dataclass
class Kill:
    """What was done: ``seconds`` after the phase had begun; ``outcome`` is "killed", or "finished" where the command
    was faster."""

    phase: str
    seconds: float
    outcome: str


class Running:
    """A command whose lines are read while it runs, with the time of each."""

    def __init__(self, nnunet: NnUNet, command: Sequence[str]) -> None:
        self.process = nnunet.start(*command)
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            with self._news:
                self.lines.append((time.monotonic() - self.started, text))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, words: str) -> None:
        """Until the words were printed, or the command ended."""
        with self._news:
            self._news.wait_for(
                lambda: self.moment(words) is not None or self.process.poll() is not None, LONGEST_S)

    def moment(self, words: str) -> float | None:
        """Seconds after the start when the words were printed first; 0 for no words."""
        return 0.0 if not words else next((at for at, text in self.lines if words in text), None)

    def finish(self) -> str:
        """All it printed, when it ended."""
        try:
            self.process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        self._reader.join()
        return "".join(text for _, text in self.lines)


@dataclass
class Killer:
    """Kills the commands of a dataset's folders; ``record`` keeps what was done."""

    nnunet: NnUNet
    seed: int
    record: list[Kill] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random, self._begun = random.Random(self.seed), set[tuple[str, ...]]()

    def kill(self, phase: Phase, times: int, length: float) -> None:
        """Start the phase's command and kill it, and all it started, at random moments; so many times, or until the
        phase is over.

        Args:
            phase: which.
            times: kills.
            length: of the undisturbed phase in seconds; the moments are drawn such that all fit into it.
        """
        for _ in range(times):
            seconds = self._random.uniform(0, length if not phase.begins else length / times)
            begun = tuple(phase.command) in self._begun
            self._begun.add(tuple(phase.command))
            running = Running(self.nnunet, phase.again if begun else phase.command)
            running.wait_for(phase.begins)
            outcome = self._strike(running, seconds)
            output = running.finish()
            assert outcome == "killed" or running.process.returncode == 0, output[-4000:]
            self.record.append(Kill(phase.name, round(seconds, 3), outcome))

    def _strike(self, running: Running, seconds: float) -> str:
        try:
            running.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.process.pid, signal.SIGKILL)
            return "killed"
        return "finished"

    def write(self, file: Path, **more: Any) -> None:
        """The record as JSON: kills, seed, and what else is to be told."""
        content = {"seed": self.seed, **more, "kills": [asdict(one) for one in self.record]}
        file.write_text(json.dumps(content, indent=1) + "\n")


def lengths(nnunet: NnUNet, phases: Sequence[Phase]) -> dict[str, float]:
    """Run the command of some phases undisturbed; seconds of each phase.

    Args:
        phases: of one and the same command.
    """
    running = Running(nnunet, phases[0].command)
    output = running.finish()
    assert running.process.returncode == 0, output[-4000:]
    total = time.monotonic() - running.started
    found = {}
    for phase in phases:
        begin, end = running.moment(phase.begins), running.moment(phase.ends) if phase.ends else total
        assert begin is not None and end is not None, f"{phase} not found in:\n{output[-4000:]}"
        found[phase.name] = end - begin
    return found


def same(one: Any, other: Any) -> bool:
    """Nested content with equal tensors, arrays, numbers and texts; NaN is equal to NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(nan=-1.5), other.nan_to_num(nan=-1.5))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


def unfinished_files(nnunet: NnUNet) -> Iterator[Path]:
    """Temporary files and folders that kills left behind."""
    for name in ("raw", "preprocessed", "results"):
        yield from (file for file in nnunet.folder(name).rglob("*.tmp*"))
