"""Learning rate of the pretraining: linear warm-up, then cosine."""

from __future__ import annotations

import math

from nnunet_cfcl.config import PretrainSettings


def learning_rate(step: int, total_steps: int, settings: PretrainSettings) -> float:
    """Rate of optimiser step ``step`` (0-based) of ``total_steps``.

    The warm-up lasts ``warmup_fraction`` of the run, at least one step, and never the whole of a run of two steps
    or more; the last step has ``final_lr`` (a run too short for a cosine ends at ``initial_lr``).
    """
    warmup = min(max(1, round(settings.warmup_fraction * total_steps)), max(1, total_steps - 1))
    if step < warmup:
        return settings.initial_lr * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    span = settings.initial_lr - settings.final_lr
    return settings.final_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
