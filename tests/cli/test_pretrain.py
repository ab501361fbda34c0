"""Ranks that are started again find each other, although torchrun's store remembers the lost ones."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from nnunet_cfcl.cli import pretrain


@pytest.fixture
def store():
    made = dist.HashStore()
    made.set_timeout(timedelta(seconds=20))
    return made


def start(store, ranks, count):
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda rank: pretrain._fresh_part(store, rank, count), ranks))


def test_all_ranks_get_one_part_and_those_of_a_restart_another(store):
    for _ in range(3):
        parts = start(store, range(4), 4)
        assert not parts[3].check(["address"])  # of an earlier start
        parts[0].set("address", "here")
        assert all(part.get("address") == b"here" for part in parts)


def test_a_start_that_lost_its_first_rank_does_not_disturb_the_next_one(store):
    store.set("question 1", "of a lost rank")
    store.add("joined of a lost rank", 1)
    parts = start(store, [1, 0], 2)
    parts[0].set("address", "here")
    assert parts[1].get("address") == b"here"


def test_one_rank_alone_waits_for_nobody(store):
    (part,) = start(store, [0], 1)
    assert not part.check(["address"])


def test_ranks_that_never_come_are_an_error_and_no_endless_wait(store, monkeypatch):
    monkeypatch.setattr(pretrain, "TIMEOUT", timedelta(seconds=0.3))
    with pytest.raises(RuntimeError, match="only 1 of 3 processes came"):
        pretrain._fresh_part(store, 0, 3)


def test_a_mistake_that_all_ranks_find_is_said_by_one(store):
    assert [pretrain._first_to_say("the plan is missing", store) for _ in range(3)] == [True, False, False]
    assert pretrain._first_to_say("another mistake", store)
    assert pretrain._first_to_say("alone", None)
