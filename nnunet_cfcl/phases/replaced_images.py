"""Fine-tuning on other acquisitions of the labelled cases: the image is replaced, the mask stays."""

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
    """What an image may be replaced by.

    Attributes:
        source: of the counterfactuals; its ``apply`` must work in data loading processes.
        probability: that it is, for an image that no earlier replacement took.
    """

    source: CounterfactualSource
    probability: float


class ReplacedImages:
    """nnU-Net's dataset of training cases, some of whose images are replaced whenever they are loaded.

    nnU-Net's data loader asks for a case, then for one box of its image: the replacement is made in that box, at the
    voxels of the preprocessed image, before any augmentation, as in the pretraining. Whether and how an image is
    replaced is drawn from NumPy's global generator, as all that nnU-Net's loader draws.

    Args:
        cases: nnU-Net's own, in either format.
        replacements: tried one after the other; the first whose turn it is replaces the image.
        spacing: (D,) voxel spacing in mm, in array-axis order; D = 2 for 2D configurations.
        replaceable: names of the cases that the sources know; the images of others stay.
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
        for one in self._replacements if identifier in self._replaceable else ():
            if np.random.uniform() < one.probability:  # noqa: NPY002 - nnU-Net's loader draws from it, too
                seed = int(np.random.randint(2**31))  # noqa: NPY002
                image = ReplacedImage(image, identifier, one.source, self._spacing, seed)
                break
        return (image, *others)


class ReplacedImage:
    """A preprocessed image (C, Z, Y, X) of which boxes can be read, as of an array, that are a counterfactual's.

    Args:
        image: the original.
        case: its name.
        source: of the counterfactual.
        spacing: (D,) in mm.
        seed: of the draw; equal seeds give equal counterfactuals of a box.
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
