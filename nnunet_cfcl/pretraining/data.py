"""What one pretraining step needs, drawn in worker processes: crops, views, counterfactual parameters, points."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import CaseReader, CounterfactualSource, require_finite
from nnunet_cfcl.pretraining.dual_view import Objective
from nnunet_cfcl.views import (
    CropBox,
    ViewGeometry,
    crop_size,
    draw_affine_views,
    draw_crop_box,
    draw_intensity,
    tissue_box,
)

POSITIONS_TRIED = 8


def generator_for(*key: int) -> Generator:
    """A CPU generator whose numbers depend on the key (seed, step, image, ...) alone."""
    # the length keeps (s, n) and (s, n, 0) apart, which numpy pads to the same numbers
    state = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class PretrainingDataset(Dataset[dict[str, Any]]):
    """Sample ``s * images_per_step + i`` is image i of step s and depends on (seed, s, i) alone.

    Args:
        reader: the cases.
        source: the counterfactuals.
        objective: draws the points.
        geometry: patch size and spacing.
        settings: all settings.
        steps: optimiser steps of the whole pretraining.
    """

    def __init__(
        self,
        reader: CaseReader,
        source: CounterfactualSource,
        objective: Objective,
        geometry: ViewGeometry,
        settings: Settings,
        steps: int,
    ) -> None:
        self._reader, self._source, self._objective = reader, source, objective
        self._geometry, self._settings, self._steps = geometry, settings, steps
        self._crop_size = crop_size(geometry, settings.views)

    def __len__(self) -> int:
        return self._steps * self._settings.pretrain.images_per_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image: ``image`` (C, *crop), ``counterfactual`` parameters, ``matrices`` (V, D, D+1), ``intensity``
        parameters of its V views, and what the objective draws."""
        step, image = divmod(index, self._settings.pretrain.images_per_step)
        generator = generator_for(self._settings.seed, step, image)
        case = self._case(index)
        box, crop = self._crop(generator, case)
        count = self._settings.counterfactual.count
        drawn = self._source.draw(generator, case, box, count)
        matrices = draw_affine_views(generator, self._geometry, self._settings.views, count + 1)
        # the original (view 0) has transform T1, the counterfactuals T2, which may solarise
        solarise = torch.arange(count + 1) > 0
        tissue = tissue_box(*box.valid_range, self._crop_size, self._geometry.spacing)
        return {
            "image": crop,
            "counterfactual": drawn,
            "matrices": matrices,
            "intensity": draw_intensity(generator, self._settings.views, count + 1, solarise),
            **self._objective.draw(generator, matrices, self._geometry, tissue),
        }

    def _case(self, index: int) -> str:
        """Rounds through all cases in a new order each, so that the images of a step differ where they can."""
        count = len(self._reader.cases)
        round_, position = divmod(index, count)
        order = np.random.default_rng([self._settings.seed, round_]).permutation(count)
        return self._reader.cases[order[position]]

    def _crop(self, generator: Generator, case: str) -> tuple[CropBox, Tensor]:
        """A random crop; one without any contrast teaches nothing, so a few positions are tried."""
        shape = self._reader.shape(case)[1:]
        for _ in range(POSITIONS_TRIED):
            box = draw_crop_box(generator, shape, self._crop_size)
            part = self._reader.read(case, box.inside)
            require_finite(part, f"case '{case}'", box.inside)
            if np.ptp(part, axis=(1, 2, 3)).any():
                break
        return box, box.pad(part)


def batches(dataset: PretrainingDataset, images_per_step: int, first_step: int, workers: int) -> Iterator[Any]:
    """Collated batches from ``first_step`` on, in order, whatever the number of worker processes.

    The processes hand over single images: whole batches, prefetched by every one of them, would fill the memory.
    """
    samples = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step * images_per_step, len(dataset)),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
    stream = iter(samples)
    while batch := list(islice(stream, images_per_step)):
        yield default_collate(batch)
