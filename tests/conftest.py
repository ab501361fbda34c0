"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch


class CasesInMemory:
    """A case reader over arrays (C, Z, Y, X), as `PreprocessedCases` is over nnU-Net's files."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)
        self.cases = tuple(sorted(arrays))
        self.known = self.cases

    def shape(self, case: str) -> tuple[int, ...]:
        return tuple(self.arrays[case].shape)

    def read(self, case: str, box: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[case][(slice(None), *box)].astype(np.float32)


@pytest.fixture
def cases_in_memory():
    """Factory: (shape (C, Z, Y, X), count) -> reader over smooth random images."""

    def make(shape: tuple[int, ...] = (1, 1, 40, 44), count: int = 4) -> CasesInMemory:
        random = np.random.default_rng(0)
        return CasesInMemory({f"case_{n}": random.normal(size=shape).cumsum(-1).cumsum(-2) / 20 for n in range(count)})

    return make


@pytest.fixture(autouse=True)
def few_threads():
    """Tests share the machine: one thread is faster than many that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
