"""Whether something is watched: for tests of what is."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nnunet_cfcl.runs import watchdog


def is_watched() -> bool:
    """By a watchdog of this process."""
    return bool(watchdog._dogs)


def noted_work(module: Any, names: Iterable[str], patch: pytest.MonkeyPatch) -> set[tuple[str, bool]]:
    """A set that fills with (name, whether it is watched) as functions of a module are called."""
    noted: set[tuple[str, bool]] = set()

    def noting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            noted.add((name, is_watched()))
            return work(*given)

        return run

    for name in names:
        patch.setattr(module, name, noting(name, getattr(module, name)))
    return noted
