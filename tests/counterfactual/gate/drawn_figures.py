"""Figures that a module draws, kept for tests to look into."""

from __future__ import annotations

from types import ModuleType

import pytest
from matplotlib.figure import Figure


def keep_figures(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Figure]:
    """A list that every figure which ``module`` makes from now on is added to."""
    kept: list[Figure] = []

    def figure(*arguments, **named):
        kept.append(Figure(*arguments, **named))
        return kept[-1]

    monkeypatch.setattr(module, "Figure", figure)
    return kept
