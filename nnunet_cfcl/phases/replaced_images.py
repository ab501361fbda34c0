"""Replace training images by counterfactuals in nnU-Net's data loading; the mask stays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views.crop_box import CropBox


@dataclass(frozen=True)
class Replacement:
    """A source of replacements and its probability.

    Attributes:
        source: the counterfactuals; its ``apply`` runs in data loading processes.
        probability: probability for an image that no earlier replacement took.
    """

    source: CounterfactualSource
    probability: float


class ReplacedImages:
    """nnU-Net's dataset of training cases, with random replacement of images at loading.

    nnU-Net's data loader asks for a case, then for one box of its image: the counterfactual is computed in that box, on
    preprocessed voxels, before any augmentation, as in the pretraining. Whether and how an image is
    replaced is drawn from NumPy's global generator, like everything that nnU-Net's loader draws.

    Args:
        cases: nnU-Net's dataset, in either storage format.
        replacements: tried in order; the first one drawn replaces the image.
        spacing: (D,) voxel spacing in mm, in array-axis order; D = 2 for 2D configurations.
        replaceable: names of the cases that the sources cover; other images stay.
    """

    def __init__(
        self, cases: Any, replacements: Sequence[Replacement], spacing: Sequence[float], replaceable: Iterable[str]
    ) -> None:
        self._cases, self._replacements, self._spacing = cases, tuple(replacements), tuple(spacing)
        self._replaceable = frozenset(replaceable)
        self.identifiers: list[str] = cases.identifiers

    def __getitem__(self, identifier: str) -> tuple[Any, Any, Any, Any]:
        return self.load_case(identifier)

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, Any]:
        """Image (C, Z, Y, X), mask (1, Z, Y, X), mask of the previous stage or None, properties."""
        image, *others = self._cases.load_case(identifier)
        for replacement in self._replacements if identifier in self._replaceable else ():
            if np.random.uniform() < replacement.probability:  # noqa: NPY002 - as nnU-Net's loader draws
                seed = int(np.random.randint(2**31))  # noqa: NPY002
                image = ReplacedImage(image, identifier, replacement.source, self._spacing, seed)
                break
        return (image, *others)


class ReplacedImage:
    """Array-like view of a preprocessed image (C, Z, Y, X) whose boxes are read from a counterfactual.

    Args:
        image: the original.
        case: name of the case.
        source: source of the counterfactual.
        spacing: (D,) in mm.
        seed: seed of the draw; equal seeds give equal counterfactuals of a box.
    """

    def __init__(
        self, image: Any, case: str, source: CounterfactualSource, spacing: Sequence[float], seed: int
    ) -> None:
        self._image, self._case, self._source, self._spacing, self._seed = image, case, source, tuple(spacing), seed
        self.shape: tuple[int, ...] = tuple(image.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x) of a region with bounds inside the image; z is 1 in 2D."""
        dim, spatial = len(self._spacing), self.shape[1:]
        ends = [axis.indices(n)[:2] for axis, n in zip(region[1:], spatial, strict=True)]
        box = CropBox(tuple(low for low, _ in ends), tuple(high - low for low, high in ends), spatial, dim)
        part = np.asarray(self._image[(slice(None), *box.inside)], np.float32)
        drawn = self._source.draw(generator_for(self._seed), self._case, box, 1)
        replaced = self._source.apply(box.pad(part)[None], drawn, self._spacing)
        return replaced.to(torch.float32).numpy().reshape(part.shape)
