"""Counterfactuals that are expensive to create: their identity is known before they are created, and only if needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Generator, Tensor

from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.views.crop_box import CropBox


class LazySource:
    """A counterfactual source that is created on demand.

    Args:
        identity: everything the counterfactuals depend on, JSON-ready, with the kind of source under "source".
        make: creates the source; called at most once.
    """

    def __init__(self, identity: Mapping[str, Any], make: Callable[[], CounterfactualSource]) -> None:
        self._identity = dict(identity)
        self.name: str = self._identity["source"]
        self._make: Callable[[], CounterfactualSource] | None = make
        self._made: CounterfactualSource | None = None

    def materialise(self) -> None:
        """Create the source unless it exists; call it before the source goes to data loading processes."""
        if self._make is not None:
            self._made = self._make()
            # the factory may hold large objects that cannot be pickled
            self._make, self.name = None, self._made.name

    def identity(self) -> dict[str, Any]:
        """The identity, which `materialise` does not change."""
        return self._identity

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> Any:
        """See `CounterfactualSource`."""
        return self.source().draw(generator, case, box, count)

    def apply(self, originals: Tensor, drawn: Any, spacing: Sequence[float]) -> Tensor:
        """See `CounterfactualSource`."""
        return self.source().apply(originals, drawn, spacing)

    def source(self) -> CounterfactualSource:
        """The source, once it is created."""
        if self._made is None:
            raise RuntimeError("the counterfactuals do not exist yet: call `materialise` first")
        return self._made
