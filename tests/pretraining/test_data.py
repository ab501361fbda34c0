"""The stream of training samples: a function of (seed, step, image) alone."""

import numpy as np
import pytest
import torch

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining.data import PretrainingDataset, batches, generator_for


def _flat(batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch
    return [tensor for part in parts for tensor in _flat(part)]


def _same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_flat(one), _flat(other), strict=True))


@pytest.fixture
def dataset(make_task):
    def make(dim=2, settings=None, reader=None) -> PretrainingDataset:
        task = make_task(settings, dim=dim, reader=reader)
        return PretrainingDataset(task.reader, task.source, task.objective, task.geometry, task.settings, steps=6)

    return make


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_the_order(dataset, workers):
    alone = list(batches(dataset(), 3, 0, 0))
    parallel = list(batches(dataset(), 3, 0, workers))
    assert len(alone) == len(parallel) == 6
    assert all(_same(a, b) for a, b in zip(alone, parallel, strict=True))


def test_a_resumed_stream_continues_with_the_same_samples(dataset):
    whole = list(batches(dataset(), 3, 0, 0))
    rest = list(batches(dataset(), 3, 4, 0))
    assert len(rest) == 2 and all(_same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_seeds_and_samples_differ(dataset):
    assert not _same(dataset()[0], dataset()[1])
    assert not _same(dataset()[0], dataset(settings={"seed": 1})[0])
    assert _same(dataset()[5], dataset()[5])


def test_the_images_of_a_round_are_all_cases_once(dataset):
    data = dataset()
    rounds = [sorted(data._case(index) for index in range(4 * n, 4 * n + 4)) for n in range(4)]
    assert all(cases == list(data._reader.cases) for cases in rounds)
    assert len({tuple(data._case(index) for index in range(4 * n, 4 * n + 4)) for n in range(12)}) > 1


@pytest.mark.parametrize("dim", [2, 3])
def test_a_sample_has_the_shapes_it_promises(dataset, dim):
    sample = dataset(dim)[0]
    assert sample["image"].ndim == dim + 1
    assert sample["matrices"].shape == (3, dim, dim + 1)
    assert sample["points"].shape == (2, 20, dim) and sample["valid"].shape == (2, 20)
    assert sample["valid"].all()


def test_a_case_with_nan_is_named_when_its_crop_is_read(cases_in_memory, dataset):
    reader = cases_in_memory()
    reader.arrays["case_2"][:, :, 15:25, 15:30] = np.nan
    data = dataset(reader=reader)
    with pytest.raises(UserError, match=r"case_2.*not finite.*doctor.*--data"):
        for index in range(len(data)):
            data[index]


def test_a_constant_crop_is_drawn_again(cases_in_memory, dataset):
    reader = cases_in_memory((1, 1, 200, 40), count=1)
    reader.arrays["case_0"][:, :, :70] = 0
    assert all(data["image"].min() < data["image"].max() for data in [dataset(reader=reader)[n] for n in range(18)])


def test_keys_give_independent_reproducible_generators():
    first = torch.rand(3, generator=generator_for(0, 1, 2))
    assert torch.equal(first, torch.rand(3, generator=generator_for(0, 1, 2)))
    assert not torch.equal(first, torch.rand(3, generator=generator_for(0, 2, 1)))
