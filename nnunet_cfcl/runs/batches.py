"""Sampling for the trainings: dataset indices of (step, image), cases of an index, collated batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.watchdog import hang_seconds


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
        UserError: raised by the dataset, in whichever process.
        RuntimeError: a worker process died, or delivers no image within the limit of the watchdog; `watched` translates
            it.
    """
    samples = _samples(dataset, order, workers)
    while batch := list(islice(samples, batch_size)):
        yield default_collate(batch)


def _samples(dataset: Dataset[Any], order: Iterable[int], workers: int) -> Iterator[Any]:
    loader: Iterable[Any] = DataLoader(
        _ErrorsAsSamples(dataset), batch_size=None, sampler=order, num_workers=workers,
        prefetch_factor=2 if workers else None, timeout=hang_seconds() if workers else 0)
    try:
        for sample in loader:
            if isinstance(sample, UserError):
                raise sample
            yield sample
    except ConnectionError:
        # the process that holds the sample died: PyTorch's handler of SIGCHLD raises an error that names the signal
        time.sleep(1)
        raise


class _ErrorsAsSamples(Dataset[Any]):
    """Hand over a `UserError` as if it were a sample: PyTorch would wrap its message into a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except UserError as error:
            return error
