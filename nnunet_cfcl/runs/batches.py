"""Sampling for the trainings: dataset indices of (step, image), cases of an index, collated batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nnunet_cfcl.runs.watchdog import hang_seconds, show_stacks_when_asked


class StepOrder(Sampler[int]):
    """Dataset indices ``step * images_per_step + image`` of some of the images of every step, step after step.

    Args:
        steps: numbers of the steps.
        images_per_step: number of images of a step, over all ranks.
        images: the images to load, a part of ``range(images_per_step)``.
    """

    def __init__(self, steps: range, images_per_step: int, images: range) -> None:
        self._steps, self._per_step, self._images = steps, images_per_step, images

    def __iter__(self) -> Iterator[int]:
        return (step * self._per_step + image for step in self._steps for image in self._images)

    def __len__(self) -> int:
        return len(self._steps) * len(self._images)


def shuffled(index: int, count: int, seed: int, *stream: int) -> int:
    """Item of draw ``index`` where every round of ``count`` draws is a new permutation of all items.

    The images of a step so come from different cases wherever there are enough of them.

    Args:
        index: number of the draw, 0-based.
        count: number of items.
        seed: seed of the permutations.
        stream: separates permutations with the same seed.
    """
    round_, position = divmod(index, count)
    return int(np.random.default_rng([seed, round_, *stream]).permutation(count)[position])


def batches(dataset: Dataset[Any], order: Iterable[int], batch_size: int, workers: int) -> Iterator[Any]:
    """Collated batches of ``batch_size`` images in the given order, whatever the number of worker processes.

    The processes hand over single images: whole batches, prefetched by every one of them, would fill the memory.

    Raises:
        RuntimeError: a worker process delivers no image within the limit of the watchdog.
    """
    samples = DataLoader(
        dataset, batch_size=None, sampler=order, num_workers=workers, prefetch_factor=2 if workers else None,
        worker_init_fn=show_stacks_when_asked, timeout=(hang_seconds() or 0) if workers else 0,
    )
    stream = iter(samples)
    while batch := list(islice(stream, batch_size)):
        yield default_collate(batch)
