"""Dataset of the pool's images: a crop, the parameters of its counterfactual, one view, intensity effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from nnunet_cfcl.config import Settings, ViewSettings
from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.reader import CaseReader, require_finite
from nnunet_cfcl.runs.batches import shuffled
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views import (
    CropBox,
    IntensityParameters,
    ViewGeometry,
    crop_size,
    draw_affine_views,
    draw_crop_box,
    draw_intensity,
)

#: Settings without intensity effects.
NO_EFFECTS = ViewSettings(jitter_probability=0.0, blur_probability=0.0, solarise_probability=0.0)
#: Separates the draws of this phase from those of the others, which have the same seed.
STREAM = 3


class WeakView(Protocol):
    """Source of the counterfactual of a pool's image on the labelled scanner; picklable."""

    def identity(self) -> dict[str, Any]:
        """JSON-ready description."""

    def read(self, case: str, box: CropBox) -> Tensor | None:
        """(C, *crop); None where the case has none, such as a case of the labelled scanner."""


def teacher_views(settings: Settings) -> ViewSettings:
    """The settings of phase 1's views with the crop of this phase; single views overlap no other."""
    return replace(settings.views, crop_fraction=settings.teacher.crop_fraction, min_overlap=0.0)


class PoolDataset(Dataset[dict[str, Any]]):
    """Sample ``s * images_per_step + i`` is image i of step s and depends on (seed, s, i) alone.

    Groups take turns, and the cases of a group as well, so that a rare scanner is seen as often as a frequent one.

    Args:
        reader: reader of the cases.
        groups: the pool's cases, scanner by scanner.
        source: source of the counterfactuals.
        geometry: patch size and spacing.
        settings: all settings.
        images_per_step: number of images of a step, over all ranks.
        weak: counterfactuals on the labelled scanner; None: there are none.
    """

    def __init__(
        self, reader: CaseReader, groups: Mapping[str, Sequence[str]], source: CounterfactualSource,
        geometry: ViewGeometry, settings: Settings, images_per_step: int, weak: WeakView | None = None,
    ) -> None:
        self._reader, self._source, self._geometry, self._seed = reader, source, geometry, settings.seed
        self._groups, self._per_step, self._weak = [tuple(cases) for cases in groups.values()], images_per_step, weak
        self._views, self._probability = teacher_views(settings), settings.teacher.intensity_probability
        self._crop_size = crop_size(geometry, self._views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draws of one image.

        Returns:
            ``image`` (C, *crop); ``counterfactual`` parameters of one counterfactual; ``matrix`` (D, D+1) of the view;
            ``intensity`` parameters; ``group`` number of the case's group; with weak views, ``weak`` (C, *crop), the
            image itself where there is none.
        """
        step, image = divmod(index, self._per_step)
        generator = generator_for(self._seed, STREAM, step, image)
        group, case = self._case(index)
        box = draw_crop_box(generator, self._reader.shape(case)[1:], self._crop_size)
        part = self._reader.read(case, box.inside)
        require_finite(part, f"case '{case}'", box.inside)
        sample = {
            "image": box.pad(part), "counterfactual": self._source.draw(generator, case, box, 1),
            "matrix": draw_affine_views(generator, self._geometry, self._views, 1)[0],
            "intensity": self._intensity(generator), "group": group}
        if self._weak is not None:
            found = self._weak.read(case, box)
            sample["weak"] = sample["image"] if found is None else found
        return sample

    def _intensity(self, generator: Generator) -> IntensityParameters:
        """Effects of one view; solarisation as for phase 1's counterfactuals."""
        applied = float(torch.rand((), generator=generator)) < self._probability
        drawn = draw_intensity(generator, self._views, 1, torch.ones(1, dtype=torch.bool))
        return drawn if applied else draw_intensity(generator, NO_EFFECTS, 1, torch.ones(1, dtype=torch.bool))

    def _case(self, index: int) -> tuple[int, str]:
        group = shuffled(index, len(self._groups), self._seed, STREAM)
        cases = self._groups[group]
        return group, cases[shuffled(index // len(self._groups), len(cases), self._seed, STREAM, group)]
