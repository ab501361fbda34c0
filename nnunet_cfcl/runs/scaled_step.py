"""Optimiser steps with a gradient scaler, which is disabled on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer


def scaled_step(
    optimizer: Optimizer, scaler: GradScaler, parameters: Iterable[nn.Parameter], clip_norm: float
) -> float:
    """Unscale and clip the gradients, then step unless they are not finite; returns their norm before clipping."""
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip_norm))
    if scaler.is_enabled() or math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    return norm


def lowers_its_scale(scaler: GradScaler, loss: float) -> bool:
    """Whether skipped steps are no error: a scaler skips them, at a finite loss, until its scale is small enough."""
    return scaler.is_enabled() and scaler.get_scale() >= 1 and math.isfinite(loss)


def restore_scaler(scaler: GradScaler, state: Mapping[str, Any]) -> None:
    """Restore a scaler's state, which is empty where the run was begun on a CPU."""
    if state and scaler.is_enabled():
        scaler.load_state_dict(dict(state))
