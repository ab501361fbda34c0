"""A linear warm-up on top of any of nnU-Net's learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from nnunet_cfcl.runs.schedule import ramp


class WarmUp:
    """Lets a schedule set the rate of an epoch, then scales it by (epoch + 1) / (n + 1) in the first n epochs.

    A cold momentum and a fresh segmentation layer would otherwise send large steps through pretrained weights.

    Args:
        schedule: nnU-Net's scheduler; its ``step(epoch)`` sets the rate.
        optimizer: whose rate is scaled.
        epochs: length of the whole training.
        fraction: share of it that is warm-up, rounded up.
    """

    def __init__(self, schedule: Any, optimizer: Optimizer, epochs: int, fraction: float) -> None:
        self._schedule, self._optimizer = schedule, optimizer
        # rounded first: 0.07 of 100 epochs is 7.000000000000001 in floating point
        self._length = math.ceil(round(fraction * epochs, 9))

    def step(self, epoch: int) -> None:
        """Set the rate of ``epoch`` (0-based)."""
        self._schedule.step(epoch)
        for group in self._optimizer.param_groups:
            group["lr"] *= ramp(epoch + 1, self._length + 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and unpickling ask before the schedule is there
            raise AttributeError(name)
        return getattr(self._schedule, name)
