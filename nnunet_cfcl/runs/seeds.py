"""Random numbers that depend on what they are for, not on when they are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator


def generator_for(*key: int) -> Generator:
    """A CPU generator whose numbers depend on the key (seed, step, image, ...) alone."""
    # the length keeps (s, n) and (s, n, 0) apart, which numpy pads to the same numbers
    state = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
