"""Random generators that depend on their purpose (seed, step, image, ...), not on the draws before."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Generator


def generator_for(*key: int) -> Generator:
    """CPU generator whose numbers depend on the key (seed, step, image, ...) alone."""
    # the length keeps (s, n) and (s, n, 0) apart, which numpy pads to the same numbers
    state = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators by a key (seed, epoch, rank, ...)."""
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))  # noqa: NPY002 - batchgenerators draws from the global state
    torch.manual_seed(int(seeds[2]))
