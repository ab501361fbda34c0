"""The temperature of a contrastive loss, fixed or learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nnunet_cfcl.config.resolution import LOWEST_MOVING_TEMPERATURE

HIGHEST_LEARNED_TEMPERATURE = 100.0


class Temperature(nn.Module):
    """Module that returns the temperature: a number, or a scalar tensor with a gradient.

    Args:
        initial: temperature; the start value of a learned one.
        learned: whether the logarithm of the temperature is a parameter.
    """

    def __init__(self, initial: float, learned: bool) -> None:
        super().__init__()
        self._fixed = initial
        self.logarithm = nn.Parameter(torch.tensor(math.log(initial))) if learned else None

    def forward(self) -> Tensor | float:
        """Return the temperature, clamped to [0.02, 100] if it is learned."""
        if self.logarithm is None:
            return self._fixed
        return self.logarithm.exp().clamp(LOWEST_MOVING_TEMPERATURE, HIGHEST_LEARNED_TEMPERATURE)
