"""Balanced choice of cases and their counterfactuals, for the gate and the contact sheet."""

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
    """The part of `CounterfactualGenerator` that the gate uses."""

    @property
    def coding(self) -> AttributeCoding:
        """Encoding of the attributes."""

    @property
    def scale(self) -> IntensityScale:
        """Intensity scale of the model."""

    @property
    def device(self) -> torch.device:
        """Device of the generator, also used to train predictor and segmenter."""

    def counterfactuals(self, images: Tensor, parents: Tensor, others: Tensor) -> Tensor:
        """Compute counterfactuals of images (N, C, *patch)."""

    def reconstruct(self, images: Tensor, parents: Tensor) -> Tensor:
        """Reconstruct images (N, C, *patch), without their residual."""


class Changed(NamedTuple):
    """Images and their counterfactuals under one intervention, on the CPU.

    Attributes:
        originals: (N, C, *patch) images.
        places: (N,) index of each original among the held-out images.
        cells: attributes of each image after the intervention.
        counterfactuals: (N, C, *patch) counterfactuals.
    """

    originals: Tensor
    places: Tensor
    cells: tuple[Cells, ...]
    counterfactuals: Tensor


def balanced_choice(patches: Patches, coding: AttributeCoding, count: int, seed: int) -> Patches:
    """Choose patches, balanced over all combinations of attribute values, then over cases.

    Args:
        patches: patches to choose from.
        coding: encoding with the binary and categorical attributes to combine.
        count: largest number of patches.
        seed: seed of the choice.
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
    """The patches at the given indices."""
    chosen = torch.tensor(list(places), dtype=torch.long)
    return replace(patches, images=patches.images[chosen], cases=tuple(patches.cases[n] for n in places),
                   cells=tuple(patches.cells[n] for n in places),
                   labels=None if patches.labels is None else patches.labels[chosen])


def counterfactuals_of(generator: JudgedGenerator, images: Tensor, before: Sequence[Cells], after: Sequence[Cells]
                       ) -> Tensor:
    """Compute counterfactuals (N, C, *patch) of any number of images in several passes; float32 on the CPU."""
    parents = [torch.stack([generator.coding.encode(cells) for cells in side]) for side in (before, after)]
    count = images_per_pass(images)
    return torch.cat([generator.counterfactuals(*part).float().cpu()
                      for part in zip(images.split(count), *(side.split(count) for side in parents))])


def reconstructions_of(generator: JudgedGenerator, patches: Patches) -> Tensor:
    """Reconstruct the images (N, C, *patch) without their residual; float32 on the CPU."""
    count = images_per_pass(patches.images)
    return torch.cat([generator.reconstruct(*part).float().cpu()
                      for part in zip(patches.images.split(count), patches.parents(generator.coding).split(count))])


def intervene(
    generator: JudgedGenerator, patches: Patches, intervention: Intervention, key: Sequence[int]
) -> Changed:
    """Compute counterfactuals of all patches, with new values drawn by the intervention.

    Args:
        generator: generator of counterfactuals.
        patches: original images.
        intervention: intervention on every patch.
        key: key of the random numbers, extended by the index of the patch.
    """
    after = tuple({**cells, **intervention.draw(generator_for(*key, place), cells)}
                  for place, cells in enumerate(patches.cells))
    made = counterfactuals_of(generator, patches.images, patches.cells, after)
    return Changed(patches.images, torch.arange(len(patches)), after, made)
