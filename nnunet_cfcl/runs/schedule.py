"""Schedules as pure functions of the step: linear ramp, cosine, and the learning rate that joins them."""

from __future__ import annotations

import math


def ramp(position: float, length: float, top: float = 1.0) -> float:
    """Linear ramp: 0 at position 0, ``top`` from position ``length`` on; a length below 1 counts as 1."""
    length = max(1, length)
    # in this order: top * (position / length) rounds differently, and changes the results of finished trainings
    return top * position / length if position <= length else top


def cosine(position: float, length: float = 1.0, start: float = 1.0, end: float = 0.0) -> float:
    """Half a cosine from ``start`` at position 0 to ``end`` at position ``length``."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * position / length))


def learning_rate(step: int, steps: int, peak: float, final: float, warmup_fraction: float) -> float:
    """Linear warm-up to ``peak``, then a cosine to ``final``.

    The warm-up lasts at least one step, and never the whole of a run of two steps or more; the last step has the rate
    ``final`` (a run too short for a cosine ends at ``peak``).

    Args:
        step: optimiser step, 0-based.
        steps: number of optimiser steps of the run.
        peak: the highest rate.
        final: the rate of the last step.
        warmup_fraction: share of the run that is warm-up.
    """
    warmup = min(max(1, round(warmup_fraction * steps)), max(1, steps - 1))
    if step < warmup:
        return ramp(step + 1, warmup, peak)
    return cosine((step - warmup + 1) / max(1, steps - warmup), start=peak, end=final)
