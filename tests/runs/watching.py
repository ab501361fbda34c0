"""Whether a block is watched: for tests of the work inside it."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nnunet_cfcl.runs import watchdog


def is_watched() -> bool:
    """Whether a `watched` block of this process is open."""
    return bool(watchdog._limits)


def noted_work(module: Any, names: Iterable[str], patch: pytest.MonkeyPatch) -> set[tuple[str, bool]]:
    """Return a set that fills with (name, whether it is watched) as functions of a module are called."""
    noted: set[tuple[str, bool]] = set()

    def noting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            noted.add((name, is_watched()))
            return work(*given)

        return run

    for name in names:
        patch.setattr(module, name, noting(name, getattr(module, name)))
    return noted


def noted_beats(patch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the limit, in seconds, whenever the watchdog begins to wait anew; it ends no process."""
    limits: list[float] = []
    patch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda limit, **options: limits.append(limit))
    return limits
