"""Random generators that depend on their purpose (seed, step, image, ...), not on the draws before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator


def generator_for(*key: int) -> Generator:
    """CPU generator whose numbers depend on the key (seed, step, image, ...) alone."""
    # the length keeps (s, n) and (s, n, 0) apart, which numpy pads to the same numbers
    state = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
