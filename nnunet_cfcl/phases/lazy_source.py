"""Counterfactuals that take hours to make: what they will be is known before, and whether anyone needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Generator, Tensor

from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.views.crop_box import CropBox


class LazySource:
    """Stands for a source that is made by `materialise`, and is that source from then on.

    Args:
        identity: all that decides about the counterfactuals, JSON-ready, with their kind under "source".
        make: makes the source; called once at most.
    """

    def __init__(self, identity: Mapping[str, Any], make: Callable[[], CounterfactualSource]) -> None:
        self._identity = dict(identity)
        self.name: str = self._identity["source"]
        self._make: Callable[[], CounterfactualSource] | None = make
        self._made: CounterfactualSource | None = None

    def materialise(self) -> None:
        """Make the source, if it is not made yet; before it goes to data loading processes."""
        if self._make is not None:
            self._made = self._make()
            # what was needed to make it may be large, and need not be picklable
            self._make, self.name = None, self._made.name

    def identity(self) -> dict[str, Any]:
        """What was promised; the same before and after."""
        return self._identity

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> Any:
        """See `CounterfactualSource`."""
        return self._source().draw(generator, case, box, count)

    def apply(self, originals: Tensor, drawn: Any, spacing: Sequence[float]) -> Tensor:
        """See `CounterfactualSource`."""
        return self._source().apply(originals, drawn, spacing)

    def _source(self) -> CounterfactualSource:
        if self._made is None:
            raise RuntimeError("these counterfactuals are promised, but not made: `materialise` comes first")
        return self._made
