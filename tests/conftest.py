"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toy_dataset import (  # noqa: F401 - fixtures
    change_plan,
    kill_first_child,
    save_case,
    settings_file,
    toy,
    toy_cases,
)


class CasesInMemory:
    """A case reader over arrays (C, Z, Y, X), as `PretrainingCases` is over nnU-Net's files; ``label_maps`` are
    (2, Z, Y, X), labels and confidence in percent, of the cases that have labels."""

    def __init__(self, arrays: Mapping[str, np.ndarray], label_maps: Mapping[str, np.ndarray] | None = None) -> None:
        self.arrays = dict(arrays)
        self.label_maps = dict(label_maps or {})
        self.cases = tuple(sorted(arrays))
        self.known = self.cases
        self.labelled = tuple(sorted(self.label_maps))

    def shape(self, case: str) -> tuple[int, ...]:
        return tuple(self.arrays[case].shape)

    def read(self, case: str, box: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[case][(slice(None), *box)].astype(np.float32)

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        if case not in self.label_maps:
            return None
        labels, confidence = self.label_maps[case][(slice(None), *box)].astype(np.int16)
        return labels, confidence


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Folder with real images and their tables, see docs/architecture.md."""
    folder = Path(os.environ.get("CFCL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set CFCL_TEST_DATA (docs/architecture.md, Development)")
    return folder


@pytest.fixture
def cases_in_memory():
    """Factory: (shape (C, Z, Y, X), count, label maps) -> reader over smooth random images of case_0, case_1, ..."""

    def make(
        shape: tuple[int, ...] = (1, 1, 40, 44), count: int = 4, label_maps: Mapping[str, np.ndarray] | None = None
    ) -> CasesInMemory:
        random = np.random.default_rng(0)
        images = {f"case_{n}": random.normal(size=shape).cumsum(-1).cumsum(-2) / 20 for n in range(count)}
        return CasesInMemory(images, label_maps)

    return make


@pytest.fixture(autouse=True)
def few_threads():
    """Tests share the machine: one thread is faster than many that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
