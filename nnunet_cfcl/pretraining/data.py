"""Dataset of the pretraining: crops, views, counterfactual parameters and points, drawn in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.reader import CaseReader, require_finite
from nnunet_cfcl.pretraining.objective import ImageViews, Objective
from nnunet_cfcl.runs.batches import shuffled
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views import (
    CropBox,
    ViewGeometry,
    crop_size,
    draw_affine_views,
    draw_crop_box,
    draw_intensity,
    tissue_box,
)

#: Number of crops drawn until one has contrast, and foreground where that is wanted.
POSITIONS_TRIED = 8


class PretrainingDataset(Dataset[dict[str, Any]]):
    """Sample ``s * images_per_step + i`` is image i of step s and depends on (seed, s, i) alone.

    Args:
        reader: reader of the cases.
        source: source of the counterfactuals.
        objective: the pretraining method, which draws the points.
        geometry: patch size and spacing.
        settings: all settings.
        steps: number of optimiser steps of the pretraining.
        ignore_label: label of voxels whose class is unknown; None: there is none.
    """

    def __init__(
        self,
        reader: CaseReader,
        source: CounterfactualSource,
        objective: Objective,
        geometry: ViewGeometry,
        settings: Settings,
        steps: int,
        ignore_label: int | None = None,
    ) -> None:
        self._reader, self._source, self._objective = reader, source, objective
        self._geometry, self._settings, self._steps, self._ignore = geometry, settings, steps, ignore_label
        self._crop_size = crop_size(geometry, settings.views)
        self._cases = tuple(reader.labelled if objective.labelled_only else reader.cases)

    def __len__(self) -> int:
        return self._steps * self._settings.pretrain.images_per_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draws of one image.

        Returns:
            ``image`` (C, *crop), ``counterfactual`` parameters, ``matrices`` (V, D, D+1) and ``intensity`` parameters
            of its V views, ``drawn`` by the objective; where the objective needs labels, ``labels`` (2, *crop) int16:
            the label map and its confidence in percent, -1 and 0 where nothing is known.
        """
        step, image = divmod(index, self._settings.pretrain.images_per_step)
        generator = generator_for(self._settings.seed, step, image)
        case = self._case(index)
        box, crop = self._crop(generator, case)
        count = self._settings.counterfactual.count
        drawn = self._source.draw(generator, case, box, count)
        matrices = draw_affine_views(generator, self._geometry, self._settings.views, count + 1)
        # the original (view 0) has transform T1, the counterfactuals T2, which may solarise
        solarise = torch.arange(count + 1) > 0
        intensity = draw_intensity(generator, self._settings.views, count + 1, solarise)
        tissue = tissue_box(*box.valid_range, self._crop_size, self._geometry.spacing)
        known = ImageViews(matrices, self._geometry, self._crop_size, tissue)
        labels = {}
        if self._objective.needs_labels:
            found = self._labels(case, box)
            labels = {"labels": _no_labels(self._crop_size) if found is None else found}
            known = known if found is None else replace(known, labels=found[0], confidence=found[1])
        return {
            "image": crop, "counterfactual": drawn, "matrices": matrices, "intensity": intensity, **labels,
            "drawn": self._objective.draw(generator, known),
        }

    def _labels(self, case: str, box: CropBox) -> Tensor | None:
        found = self._reader.labels(case, box.inside)
        if found is None:
            return None
        labels, confidence = found
        return torch.cat([box.pad(labels[None], -1), box.pad(confidence[None], 0)]).to(torch.int16)

    def _case(self, index: int) -> str:
        return self._cases[shuffled(index, len(self._cases), self._settings.seed)]

    def _crop(self, generator: Generator, case: str) -> tuple[CropBox, Tensor]:
        """Random crop. A few positions are tried: a constant crop carries no information, and a share of the crops of a
        supervised method should contain foreground."""
        shape, share = self._reader.shape(case)[1:], self._settings.silver.balanced_share
        wants_foreground = self._objective.needs_labels and float(torch.rand((), generator=generator)) < share
        for _ in range(POSITIONS_TRIED):
            box = draw_crop_box(generator, shape, self._crop_size)
            part = self._reader.read(case, box.inside)
            require_finite(part, f"case '{case}'", box.inside)
            if np.ptp(part, axis=(1, 2, 3)).any() and (not wants_foreground or self._has_foreground(case, box)):
                break
        return box, box.pad(part)

    def _has_foreground(self, case: str, box: CropBox) -> bool:
        found = self._reader.labels(case, box.inside)
        return found is None or bool(((found[0] > 0) & (found[0] != self._ignore)).any())


def _no_labels(crop_size: Sequence[int]) -> Tensor:
    return torch.stack([torch.full(tuple(crop_size), value, dtype=torch.int16) for value in (-1, 0)])
