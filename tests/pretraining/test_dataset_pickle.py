"""The dataset travels to worker processes that were spawned, not forked."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.methods import DVD_CL, MethodContext
from nnunet_cfcl.views import ViewGeometry


def tensors(sample) -> list[torch.Tensor]:
    if isinstance(sample, torch.Tensor):
        return [sample]
    return [tensor for part in (sample.values() if isinstance(sample, dict) else sample) for tensor in tensors(part)]


@pytest.fixture
def objective():
    """What the trainer itself builds."""
    settings = resolve_settings({"pretrain": {"points_per_image": 20}})
    return DVD_CL.build(MethodContext(settings, ViewGeometry((24, 28), (1.0, 1.0)), 1, None, None))


@pytest.fixture
def dataset(make_task, objective):
    task = make_task(objective=objective)
    return PretrainingDataset(task.reader, task.source, objective, task.geometry, task.settings, steps=2)


def test_a_pickled_dataset_gives_the_same_samples(dataset):
    again = pickle.loads(pickle.dumps(dataset))
    assert len(again) == len(dataset) == 6
    for index in range(len(dataset)):
        pairs = list(zip(tensors(dataset[index]), tensors(again[index]), strict=True))
        assert len(pairs) > 10 and all(torch.equal(a, b) for a, b in pairs)


def test_spawned_workers_give_the_samples_of_the_main_process(dataset):
    loader = DataLoader(dataset, batch_size=3, sampler=range(3, 6), num_workers=1, multiprocessing_context="spawn")
    (batch,) = loader
    expected = default_collate([dataset[index] for index in range(3, 6)])
    assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(batch), strict=True))
