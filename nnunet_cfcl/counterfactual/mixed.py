"""Mixed source: a generator for interventions that passed the gate, analytic acquisition for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from nnunet_cfcl.counterfactual.acquisition.effects import AcquisitionParameters
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, take
from nnunet_cfcl.views.crop_box import CropBox


class MixedParameters(NamedTuple):
    """Parameters of n counterfactuals from both sources, and the source of each.

    Attributes:
        generated: n rows drawn by the generator's source; rows of acquisitions repeat generated rows.
        acquired: n acquisitions.
        is_generated: (n,) bool, True for rows of the generator.
    """

    generated: Any
    acquired: AcquisitionParameters
    is_generated: Tensor


class MixedSource:
    """Random interventions in equal proportions, with an acquisition for each intervention that failed the gate.

    Args:
        generated: source of the interventions that passed.
        acquisition: source for the others.
        passed, failed: numbers of interventions that passed and failed, at least 1 each.
    """

    def __init__(
        self, generated: CounterfactualSource, acquisition: AcquisitionSource, passed: int, failed: int
    ) -> None:
        self.name = f"{generated.name} and {acquisition.name}"
        self.generated, self._acquisition, self._passed, self._failed = generated, acquisition, passed, failed

    def identity(self) -> dict[str, Any]:
        """Identities of both sources and the number of failed interventions."""
        return {"source": self.name, "generated": self.generated.identity(), "failed": self._failed,
                "acquisition": self._acquisition.identity()}

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> MixedParameters:
        """Draw ``count`` interventions in random order, repeated only where there are fewer."""
        number = self._passed + self._failed
        rounds = [torch.randperm(number, generator=generator) for _ in range(-(-count // number))]
        is_generated = torch.cat(rounds)[:count] < self._passed
        # only as many as are used: the generator's source takes its interventions in turn, and would skip some
        drawn = self.generated.draw(generator, case, box, max(1, int(is_generated.sum())))
        generated = take(drawn, (is_generated.cumsum(0) - 1).clamp_min(0))
        return MixedParameters(generated, self._acquisition.draw(generator, case, box, count), is_generated)

    def apply(self, originals: Tensor, drawn: MixedParameters, spacing: Sequence[float]) -> Tensor:
        """See both sources' ``apply``."""
        made = torch.empty_like(originals)
        for source, parameters, chosen in (
                (self.generated, drawn.generated, drawn.is_generated),
                (self._acquisition, drawn.acquired, ~drawn.is_generated)):
            if chosen.any():
                rows = chosen.nonzero()[:, 0]
                places = rows.to(originals.device)
                made[places] = source.apply(originals[places], take(parameters, rows), spacing)
        return made
