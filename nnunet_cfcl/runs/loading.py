"""Samples and batches from data loading processes, in a fixed order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.watchdog import hang_seconds


def batches(dataset: Dataset[Any], order: Sampler[int] | list[int], batch_size: int, workers: int) -> Iterator[Any]:
    """Collated batches of ``batch_size`` samples in the given order, whatever the number of worker processes.

    The processes hand over single samples: whole batches, prefetched by every process, would fill the memory.

    Args:
        dataset: samples by number.
        order: numbers of the samples.
        batch_size: samples of a batch; the last batch may be smaller.
        workers: data loading processes; 0 loads in this process.

    Raises:
        UserError: raised by the dataset, in whichever process.
    """
    samples = _samples(dataset, order, workers)
    while batch := list(islice(samples, batch_size)):
        yield default_collate(batch)


def _samples(dataset: Dataset[Any], order: Sampler[int] | list[int], workers: int) -> Iterator[Any]:
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
