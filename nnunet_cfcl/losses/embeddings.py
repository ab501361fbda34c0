"""What all contrastive objectives do with embeddings before they compare them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_cfcl.losses.blockwise import FLOAT64_BOUND

#: Smallest temperature whose exponentials can be represented.
MIN_TEMPERATURE = 1 / FLOAT64_BOUND


def unit_embeddings(z: Tensor) -> Tensor:
    """Scale embeddings (..., d) to unit length in float32 (float64 stays); a zero embedding stays zero.

    Half precision is left before the norm is taken: its squares overflow from a length of 256.
    """
    return functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless temperature lies in [``MIN_TEMPERATURE``, infinity)."""
    if not MIN_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least {MIN_TEMPERATURE:g}, got {temperature}")
