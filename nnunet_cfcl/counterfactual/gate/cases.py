"""What the gate and the pictures look at: a choice of cases, and what a generator makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nnunet_cfcl.counterfactual.gate.attribute_predictor import images_per_pass
from nnunet_cfcl.counterfactual.generator.data import Cells, Patches
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import AttributeCoding
from nnunet_cfcl.runs.seeds import generator_for


class JudgedGenerator(Protocol):
    """What the gate needs of a `CounterfactualGenerator`."""

    @property
    def coding(self) -> AttributeCoding:
        """Of the attributes."""

    @property
    def scale(self) -> IntensityScale:
        """Of the intensities."""

    @property
    def device(self) -> torch.device:
        """Where it works; the predictor and the segmenter are trained there too."""

    def counterfactuals(self, images: Tensor, parents: Tensor, others: Tensor) -> Tensor:
        """Counterfactuals of images (N, C, *patch)."""

    def reconstruct(self, images: Tensor, parents: Tensor) -> Tensor:
        """What the generator makes of images (N, C, *patch) without their residual."""


class Changed(NamedTuple):
    """Images and what an intervention makes of them, on the CPU.

    Attributes:
        originals: (N, C, *patch) with the place (N,) of each among the held-out ones.
        places: see above.
        cells: the attributes afterwards.
        counterfactuals: (N, C, *patch).
    """

    originals: Tensor
    places: Tensor
    cells: tuple[Cells, ...]
    counterfactuals: Tensor


def balanced_choice(patches: Patches, coding: AttributeCoding, count: int, seed: int) -> Patches:
    """At most ``count`` patches, of all combinations of values in turn, and of all cases before a case comes again.

    Args:
        patches: to choose from.
        coding: whose binary and categorical attributes make the combinations.
        count: of patches.
        seed: of the choice.
    """
    names = [attribute.name for attribute in coding.attributes if attribute.kind != "continuous"]
    order: Sequence[int] = np.random.default_rng(seed).permutation(len(patches)).tolist()
    groups = [tuple(cells.get(name, "") for name in names) for cells in patches.cells]
    for key in (patches.cases, groups):
        seen: Counter[object] = Counter()
        ranks = {}
        for place in order:
            ranks[place] = seen[key[place]]
            seen[key[place]] += 1
        order = sorted(order, key=ranks.__getitem__)
    return subset(patches, sorted(order[:count]))


def subset(patches: Patches, places: Sequence[int]) -> Patches:
    """The patches at these places."""
    chosen = torch.tensor(list(places), dtype=torch.long)
    return replace(patches, images=patches.images[chosen], cases=tuple(patches.cases[n] for n in places),
                   cells=tuple(patches.cells[n] for n in places),
                   labels=None if patches.labels is None else patches.labels[chosen])


def counterfactuals_of(generator: JudgedGenerator, images: Tensor, before: Sequence[Cells], after: Sequence[Cells]
                       ) -> Tensor:
    """Counterfactuals (N, C, *patch) float32 on the CPU of any number of images, a few at a time."""
    parents = [torch.stack([generator.coding.encode(cells) for cells in side]) for side in (before, after)]
    count = images_per_pass(images)
    return torch.cat([generator.counterfactuals(*part).float().cpu()
                      for part in zip(images.split(count), *(side.split(count) for side in parents))])


def reconstructions_of(generator: JudgedGenerator, patches: Patches) -> Tensor:
    """What the generator makes of the images without their residual, (N, C, *patch) float32 on the CPU."""
    count = images_per_pass(patches.images)
    return torch.cat([generator.reconstruct(*part).float().cpu()
                      for part in zip(patches.images.split(count), patches.parents(generator.coding).split(count))])


def intervene(
    generator: JudgedGenerator, patches: Patches, intervention: Intervention, key: Sequence[int]
) -> Changed:
    """Counterfactuals of all patches, with new values drawn by the intervention.

    Args:
        generator: of counterfactuals.
        patches: to change.
        intervention: what is changed.
        key: of the draws, continued by the number of the patch.
    """
    after = tuple({**cells, **intervention.draw(generator_for(*key, place), cells)}
                  for place, cells in enumerate(patches.cells))
    made = counterfactuals_of(generator, patches.images, patches.cells, after)
    return Changed(patches.images, torch.arange(len(patches)), after, made)
