"""Linear warm-up on top of any of nnU-Net's learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from nnunet_cfcl.runs.schedule import ramp


class WarmUp:
    """Scale a schedule's learning rate by (epoch + 1) / (n + 1) in the first n epochs.

    Without warm-up, empty momentum buffers and freshly initialised segmentation layers cause large updates of the
    pretrained weights.

    Args:
        schedule: nnU-Net's scheduler, whose ``step(epoch)`` sets the rate.
        optimizer: optimiser whose rate is scaled.
        epochs: number of epochs of the training.
        fraction: fraction of the epochs with warm-up, rounded up.
    """

    def __init__(self, schedule: Any, optimizer: Optimizer, epochs: int, fraction: float) -> None:
        self._schedule, self._optimizer = schedule, optimizer
        # rounded first: 0.07 of 100 epochs is 7.000000000000001 in floating point
        self._length = math.ceil(round(fraction * epochs, 9))

    def step(self, epoch: int) -> None:
        """Set the learning rate of ``epoch`` (0-based)."""
        self._schedule.step(epoch)
        for group in self._optimizer.param_groups:
            group["lr"] *= ramp(epoch + 1, self._length + 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle look attributes up before the schedule is set
            raise AttributeError(name)
        return getattr(self._schedule, name)
