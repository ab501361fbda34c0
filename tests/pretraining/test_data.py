"""The stream of training samples: a function of (seed, step, image) alone."""

import numpy as np
import pytest
import torch

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.pretraining.point_labels import PointLabels
from nnunet_cfcl.runs.batches import StepOrder, batches

ALL_STEPS = StepOrder(range(6), 3, range(3))


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
    alone = list(batches(dataset(), ALL_STEPS, 3, 0))
    parallel = list(batches(dataset(), ALL_STEPS, 3, workers))
    assert len(alone) == len(parallel) == 6
    assert all(_same(a, b) for a, b in zip(alone, parallel, strict=True))


def test_a_resumed_stream_continues_with_the_same_samples(dataset):
    whole = list(batches(dataset(), ALL_STEPS, 3, 0))
    rest = list(batches(dataset(), StepOrder(range(4, 6), 3, range(3)), 3, 0))
    assert len(rest) == 2 and all(_same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_the_images_of_a_step_are_split_and_together_are_the_step(dataset):
    whole = list(batches(dataset(), ALL_STEPS, 3, 0))
    orders = [StepOrder(range(6), 3, images) for images in (range(1), range(1, 3))]
    parts = [list(batches(dataset(), order, len(order) // 6, 0)) for order in orders]
    for step in range(6):
        joined = [torch.cat(pair) for pair in zip(_flat(parts[0][step]), _flat(parts[1][step]), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(joined, _flat(whole[step]), strict=True))


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
    drawn = sample["drawn"]
    assert drawn["points"].shape == (2, 20, dim) and drawn["valid"].shape == (2, 20)
    assert drawn["valid"].all()


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


def test_a_share_of_the_crops_of_a_supervised_method_holds_foreground(make_task, cases_in_memory):
    labels = np.zeros((2, 1, 200, 200), np.int16)
    labels[0, 0, 150:153, 150:153], labels[1] = 1, 100  # in about 3 % of the crops
    reader = cases_in_memory((1, 1, 200, 200), count=1, label_maps={"case_0": labels})

    def foreground(objective, share):
        task = make_task({"silver": {"balanced_share": share}}, reader=reader, objective=objective)
        data = PretrainingDataset(reader, task.source, objective, task.geometry, task.settings, steps=30)
        return sum(bool((data[index]["labels"][0] > 0).any()) for index in range(60))

    supervised = DualViewObjective(20, PointLabels(0.5))
    assert foreground(supervised, 0.0) <= 8
    assert foreground(supervised, 1.0) >= foreground(supervised, 0.0) + 8


def test_the_ignore_label_is_no_foreground_that_a_crop_is_drawn_for(make_task, cases_in_memory):
    labels = np.zeros((2, 1, 200, 200), np.int16)
    labels[0], labels[0, 0, :, ::4], labels[1] = 2, 0, 100  # sparse scribbles of background, ignored elsewhere
    labels[0, 0, 150:153, 150:153] = 1
    reader = cases_in_memory((1, 1, 200, 200), count=1, label_maps={"case_0": labels})

    def organ(ignore_label):
        objective = DualViewObjective(20, PointLabels(0.5, ignore_label))
        task = make_task({"silver": {"balanced_share": 1.0}}, reader=reader, objective=objective)
        data = PretrainingDataset(reader, task.source, objective, task.geometry, task.settings, 30, ignore_label)
        return sum(bool((data[index]["labels"][0] == 1).any()) for index in range(60))

    assert organ(2) >= organ(None) + 8


def test_an_image_without_labels_has_an_unknown_label_everywhere(make_task, cases_in_memory):
    objective = DualViewObjective(20, PointLabels(0.5))
    task = make_task(reader=cases_in_memory(), objective=objective)
    sample = PretrainingDataset(task.reader, task.source, objective, task.geometry, task.settings, steps=1)[0]
    assert (sample["labels"][0] == -1).all() and (sample["labels"][1] == 0).all()
    assert not sample["drawn"]["labelled"]
