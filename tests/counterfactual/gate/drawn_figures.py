"""Access to the figures that a module draws."""

from __future__ import annotations

from types import ModuleType

import pytest
from matplotlib.figure import Figure


def keep_figures(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Figure]:
    """List to which every new figure of ``module`` is appended."""
    kept: list[Figure] = []

    def figure(*arguments, **named):
        kept.append(Figure(*arguments, **named))
        return kept[-1]

    monkeypatch.setattr(module, "Figure", figure)
    return kept
