"""Samples whose counterfactuals come from a store."""

import pytest
import torch

from nnunet_cfcl.counterfactual import CounterfactualStore
from nnunet_cfcl.counterfactual.source import PrecomputedSource
from nnunet_cfcl.pretraining.data import PretrainingDataset


@pytest.mark.parametrize(
    ("dim", "shape"),
    [
        pytest.param(2, (2, 5, 60, 58), id="slices larger than the crop"),
        pytest.param(2, (1, 1, 60, 23), id="an image smaller than the crop along one axis"),
        pytest.param(3, (1, 30, 28, 32), id="volumes larger than the crop"),
        pytest.param(3, (2, 9, 28, 13), id="volumes smaller than the crop along two axes"),
    ],
)
def test_a_sample_holds_the_same_place_of_the_case_and_of_its_stored_counterfactuals(
    make_task, cases_in_memory, tmp_path, dim, shape
):
    """A store that is a copy of the cases gives copies of the crops: any shift of the box would show."""
    reader = cases_in_memory(shape, count=3)
    store = CounterfactualStore.create(tmp_path / "store", ["copy", "twin"], "test")
    for case, array in reader.arrays.items():
        for name in store.interventions:
            store.write(case, name, array)
    task = make_task(dim=dim, reader=reader, source=PrecomputedSource(store))
    data = PretrainingDataset(task.reader, task.source, task.objective, task.geometry, task.settings, steps=4)
    for index in range(len(data)):
        sample = data[index]
        copies = sample["counterfactual"].images
        assert copies.shape == (2, *sample["image"].shape)
        assert all(torch.equal(copy, sample["image"]) for copy in copies)
