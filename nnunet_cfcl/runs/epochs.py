"""The epoch loop of all trainings: resumption, progress bar, watchdog, log and checkpoints."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from nnunet_cfcl.config import Settings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.runs.batches import StepOrder, batches
from nnunet_cfcl.runs.checkpoint import load_checkpoint, save_checkpoint
from nnunet_cfcl.runs.epoch_log import EpochLog
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.runs.watchdog import watched

Batch = TypeVar("Batch")
#: Statistics of a step or means of an epoch, by name.
Line = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """Fields that the tasks of all trainings share.

    Attributes:
        settings: all settings.
        device: cpu or cuda.
        workers: number of data loading processes; 0 loads in this process.
        folder: folder of the checkpoints.
        identity: everything that determines the trained weights, JSON-ready; saved in the checkpoints with its hash.
        log: writes a line for the user.
        ranks: the processes that share every step.
        checkpoints: whether anything is saved.
    """

    settings: Settings
    device: torch.device
    workers: int
    folder: Path
    identity: Mapping[str, Any]
    log: Callable[[str], None]
    ranks: Ranks = Ranks()
    checkpoints: bool = True


class EpochLoop(ABC, Generic[Batch]):
    """Trains epoch by epoch; a run that was killed resumes after its last finished epoch, with the same results.

    At the end of an epoch the main rank writes a line of the log, saves `latest`, and reports only then: nothing that
    was reported is lost by a kill. After the last epoch `final` replaces `latest`. All of it is watched, see
    `runs.watchdog.watched`.

    Args:
        task: the fields that all tasks share.
        epochs: number of epochs.
        iterations: number of optimiser steps of an epoch.
        images_per_step: number of images of a step, over all ranks.
        setting: name of the setting of ``images_per_step``, for messages.

    Attributes:
        data: dataset of single images; index ``step * images_per_step + image``. Set by the subclass.

    Raises:
        UserError: fewer images per step than ranks.
    """

    #: Name of the training in messages and in the progress bar, and the statistic that the bar shows.
    title: str
    shown: str
    #: Files in the task's folder, and the folder of log and pictures below it.
    latest_name = "checkpoint_latest.pth"
    final_name = "checkpoint_final.pth"
    log_folder = "."

    data: Dataset[Any]

    def __init__(self, task: TrainingTask, epochs: int, iterations: int, images_per_step: int, setting: str) -> None:
        self.task, self.ranks, self.epochs = task, task.ranks, epochs
        self.iterations, self.images_per_step = iterations, images_per_step
        self.total_steps = epochs * self.iterations
        self.images = self.ranks.images(images_per_step, setting=setting)

    @property
    def latest(self) -> Path:
        """Checkpoint of the last finished epoch."""
        return self.task.folder / self.latest_name

    @property
    def final(self) -> Path:
        """File of the finished training."""
        return self.final_in(self.task.folder)

    @classmethod
    def final_in(cls, folder: Path) -> Path:
        """File of the finished training in a task's folder."""
        return folder / cls.final_name

    @property
    def saves(self) -> bool:
        """Whether this rank writes files."""
        return self.task.checkpoints and self.ranks.is_main

    # ---------------------------------------------------------------- the parts that differ

    @abstractmethod
    def step(self, batch: Batch, number: int) -> dict[str, float]:
        """One optimiser step on this rank's collated images; returns its statistics, with `shown` and ``skipped``."""

    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """Modules whose parameters and buffers are the same on all ranks."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Content of a checkpoint, apart from ``epoch``, ``identity`` and ``hash``."""

    @abstractmethod
    def load_state(self, content: dict[str, Any]) -> None:
        """Restore `state`."""

    @abstractmethod
    def check_identity(self, content: Mapping[str, Any]) -> None:
        """Reject a checkpoint of another training.

        Raises:
            UserError: the checkpoint has another identity than the task.
        """

    @abstractmethod
    def all_skipped(self, last: Line) -> tuple[str, str] | None:
        """Reason why all steps of an epoch were skipped and the setting to lower; None where that is no error.

        Args:
            last: statistics of the last step.
        """

    @abstractmethod
    def plot(self, lines: Sequence[Line], file: Path) -> None:
        """Draw the curves of all epochs as PNG."""

    @abstractmethod
    def report(self, line: Line) -> None:
        """Log the means of an epoch."""

    def begin(self) -> None:
        """Called before the first epoch of the run."""

    def validate(self) -> dict[str, float]:
        """Metrics of an epoch beside the means of its steps."""
        return {}

    def end_epoch(self, epoch: int) -> None:
        """Called on the main rank when an epoch is saved and reported."""

    def save_final(self) -> None:
        """Write `final`."""
        save_checkpoint(self._checkpoint(self.epochs), self.final)

    # ---------------------------------------------------------------- the loop

    def run(self, resume: bool) -> None:
        """Train; with ``resume`` from the end of the epoch in `latest` on, where that file exists.

        Raises:
            UserError: `latest` belongs to another training; no step of an epoch could be made; the disk is full.
        """
        with watched(self.title, self.task.log) as beat:
            first_epoch = self._restore() if resume else 0
            folder = self.task.folder / self.log_folder if self.saves else None
            log = EpochLog(folder, first_epoch, self.plot, self.task.log)
            self.begin()
            data = self.batches(first_epoch)
            for epoch in range(first_epoch, self.epochs):
                self._run_epoch(epoch, data, log, beat)
            if self.saves:
                self.save_final()
                self.latest.unlink(missing_ok=True)
            self.ranks.wait()

    def batches(self, first_epoch: int) -> Iterator[Batch]:
        """This rank's collated images, step by step."""
        steps = range(first_epoch * self.iterations, self.total_steps)
        order = StepOrder(steps, self.images_per_step, self.images)
        return batches(self.data, order, len(self.images), self.task.workers)

    def _run_epoch(self, epoch: int, data: Iterator[Batch], log: EpochLog, beat: Callable[[], None]) -> None:
        started = time.perf_counter()
        steps = self._steps(epoch, data, beat)
        for module in self.modules():
            self.ranks.broadcast_parameters(module)  # processors of different kinds round differently
        if self.ranks.is_main:
            seconds, images = time.perf_counter() - started, len(steps) * self.images_per_step
            line = log.end_epoch(epoch, steps, seconds, images, self.validate())
            if self.saves:
                save_checkpoint(self._checkpoint(epoch + 1), self.latest)
            self.report(line)
            self.end_epoch(epoch)
        beat()

    def _steps(self, epoch: int, data: Iterator[Batch], beat: Callable[[], None]) -> list[dict[str, float]]:
        """The statistics of all steps of an epoch."""
        steps = []
        # disable=None: the bar is drawn on a terminal only
        hidden = None if self.ranks.is_main else True
        numbers = range(epoch * self.iterations, (epoch + 1) * self.iterations)
        with tqdm(numbers, desc=f"{self.title} {epoch + 1}/{self.epochs}", disable=hidden) as bar:
            for number in bar:
                steps.append(self.step(next(data), number))
                beat()
                bar.set_postfix({self.shown: f"{steps[-1][self.shown]:.3f}"})
        if all(step["skipped"] for step in steps) and (found := self.all_skipped(steps[-1])):
            reason, setting = found
            raise UserError(f"{self.title} epoch {epoch}: {reason}",
                            f"look for extreme intensities with `nnunet_cfcl doctor --data`, or lower {setting}")
        return steps

    def _checkpoint(self, epoch: int) -> dict[str, Any]:
        """Content of a checkpoint after ``epoch`` epochs."""
        identity = self.task.identity
        return {**self.state(), "epoch": epoch, "identity": dict(identity), "hash": digest(identity)}

    def _restore(self) -> int:
        """The epoch to resume at, 0 without a checkpoint; only the main rank needs to see the file."""
        found = load_checkpoint(self.latest) if self.ranks.is_main and self.latest.exists() else None
        content = self.ranks.broadcast_object(found)
        if content is None:
            return 0
        self.check_identity(content)
        self.load_state(content)
        epoch = int(content["epoch"])
        if self.ranks.is_main:
            self.task.log(f"{self.title.capitalize()} resumes after epoch {epoch - 1} ({self.latest})")
        return epoch
