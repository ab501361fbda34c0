"""The sampler of both trainings: which index, which case, which batch."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from nnunet_cfcl.runs import batches as batches_module
from nnunet_cfcl.runs.batches import StepOrder, batches, shuffled


class Indices(Dataset):
    """Sample n is n."""

    def __getitem__(self, index):
        return torch.tensor(index)


def test_the_order_is_that_of_the_steps_and_within_them_that_of_the_images():
    order = StepOrder(range(2, 4), 5, range(1, 3))
    assert list(order) == [11, 12, 16, 17] and len(order) == 4


def test_every_round_is_all_items_once_in_an_order_of_its_own():
    rounds = [[shuffled(index, 6, 3) for index in range(6 * n, 6 * n + 6)] for n in range(8)]
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert len(set(map(tuple, rounds))) > 5


def test_seeds_and_streams_have_orders_of_their_own():
    orders = Counter(tuple(shuffled(index, 50, *key) for index in range(50)) for key in ((0,), (1,), (0, 1), (0, 2)))
    assert len(orders) == 4


def test_the_draws_are_those_of_before():
    for count in (1, 5, 17):
        for index in range(60):
            round_, position = divmod(index, count)
            assert shuffled(index, count, 9) == np.random.default_rng([9, round_]).permutation(count)[position]
            assert shuffled(index, count, 9, 1) == np.random.default_rng([9, round_, 1]).permutation(count)[position]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_collated_in_order_whatever_the_number_of_workers(workers):
    found = list(batches(Indices(), StepOrder(range(3), 4, range(1, 3)), 2, workers))
    assert [batch.tolist() for batch in found] == [[1, 2], [5, 6], [9, 10]]


@pytest.mark.parametrize(("limit", "workers", "timeout"), [(60.0, 2, 60.0), (0.0, 2, 0), (60.0, 0, 0)])
def test_waiting_for_a_worker_ends_at_the_limit_of_the_watchdog(monkeypatch, limit, workers, timeout):
    given = {}

    class Loader(list):
        def __init__(self, *arguments, **options):
            given.update(options)

    monkeypatch.setattr(batches_module, "DataLoader", Loader)
    monkeypatch.setattr(batches_module, "hang_seconds", lambda: limit)
    assert list(batches(Indices(), [0], 1, workers)) == []
    assert given["timeout"] == timeout and given["num_workers"] == workers
