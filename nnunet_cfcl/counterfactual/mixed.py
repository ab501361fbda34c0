"""Counterfactuals of a generator where it passed the gate, of analytic acquisitions where it did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from nnunet_cfcl.counterfactual.acquisition.effects import AcquisitionParameters
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, take
from nnunet_cfcl.views.crop_box import CropBox


class MixedParameters(NamedTuple):
    """Both sources' parameters of n counterfactuals, and which source each one is of.

    Attributes:
        generated: of the generator's source, whatever it draws; rows that are not generated repeat others.
        acquired: of the acquisitions.
        is_generated: (n,) bool.
    """

    generated: Any
    acquired: AcquisitionParameters
    is_generated: Tensor


class MixedSource:
    """Every intervention has its turn; one that the gate did not let pass has an acquisition in its place.

    Args:
        generated: of the interventions that passed.
        acquisition: for the others.
        passed, failed: how many there are of both, at least one each.
    """

    name = "generator and acquisition"

    def __init__(
        self, generated: CounterfactualSource, acquisition: AcquisitionSource, passed: int, failed: int
    ) -> None:
        self._generated, self._acquisition, self._passed, self._failed = generated, acquisition, passed, failed

    def identity(self) -> dict[str, Any]:
        """Both sources', and how often which is asked."""
        return {"source": self.name, "generated": self._generated.identity(), "failed": self._failed,
                "acquisition": self._acquisition.identity()}

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> MixedParameters:
        """``count`` of all interventions in random order, which repeat only where there are fewer."""
        number = self._passed + self._failed
        rounds = [torch.randperm(number, generator=generator) for _ in range(-(-count // number))]
        is_generated = torch.cat(rounds)[:count] < self._passed
        # no more than are used: they take turns, and one that is left out would miss its own
        drawn = self._generated.draw(generator, case, box, max(1, int(is_generated.sum())))
        generated = take(drawn, (is_generated.cumsum(0) - 1).clamp_min(0))
        return MixedParameters(generated, self._acquisition.draw(generator, case, box, count), is_generated)

    def apply(self, originals: Tensor, drawn: MixedParameters, spacing: Sequence[float]) -> Tensor:
        """See both sources' ``apply``."""
        made = torch.empty_like(originals)
        for source, parameters, chosen in (
                (self._generated, drawn.generated, drawn.is_generated),
                (self._acquisition, drawn.acquired, ~drawn.is_generated)):
            if chosen.any():
                rows = chosen.nonzero()[:, 0]
                places = rows.to(originals.device)
                made[places] = source.apply(originals[places], take(parameters, rows), spacing)
        return made
