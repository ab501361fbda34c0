"""Every baseline in the real loop: several passes equal one, resumption is exact, objectives travel to workers."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from nnunet_cfcl.pretraining import loop
from nnunet_cfcl.pretraining.loop import Pretraining
from nnunet_cfcl.pretraining.objectives.image_contrast import ImageContrastObjective
from nnunet_cfcl.pretraining.objectives.masked_autoencoder import MaskedAutoencoderObjective
from nnunet_cfcl.pretraining.objectives.pixpro import PixProObjective
from nnunet_cfcl.pretraining.objectives.silver_segmentation import SilverSegmentationObjective

SHAPES = {2: (1, 1, 40, 44), 3: (1, 20, 24, 22)}


def mean_cross_entropy(logits, labels):
    return functional.cross_entropy(logits, labels[:, 0].clamp(min=0).long())


OBJECTIVES = {
    "simclr": lambda geometry: ImageContrastObjective(0.5),
    "pixpro": lambda geometry: PixProObjective(20, 0.1, 0.9, 2.0),
    "mae": lambda geometry: MaskedAutoencoderObjective(geometry.patch_size, 1, 0.5, 4),
    "silver": lambda geometry: SilverSegmentationObjective(geometry, mean_cross_entropy),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the training."""
    monkeypatch.setattr(loop, "plot_progress", lambda epochs, file: Path(file).touch())
    monkeypatch.setattr(loop, "plot_views", lambda *arguments: None)


@pytest.fixture
def task_of(make_task, cases_in_memory):
    """(name, dim, fields of the task) -> task; one of the four cases has no labels."""

    def make(name: str, dim: int = 2, **fields):
        images = cases_in_memory(SHAPES[dim]).arrays
        maps = {case: np.stack([image[0] > image.mean(), np.ones_like(image[0])]) for case, image in images.items()}
        del maps["case_3"]
        task = make_task(dim=dim, reader=cases_in_memory(SHAPES[dim], label_maps=maps), **fields)
        return dataclasses.replace(task, objective=OBJECTIVES[name](task.geometry))

    return make


def to_double(inputs):
    if isinstance(inputs, torch.Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    return type(inputs)(to_double(part) for part in inputs) if inputs is not None else None


def in_float64(pretraining: Pretraining) -> Pretraining:
    render, inputs = pretraining.render, pretraining.objective.inputs
    pretraining.model.double()
    pretraining._encode = lambda batch, rows: pretraining.model(
        render(batch, rows).double(), to_double(inputs(batch, rows, torch.device("cpu"))))
    return pretraining


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_passes_give_the_loss_and_gradients_of_one(task_of, network, name, dim):
    found = []
    for patches in (100, 4, 1):
        net = network(dim).double()
        pretraining = in_float64(Pretraining(net, net, 6, task_of(name, dim, patches_per_pass=patches)))
        loss = pretraining.backward(next(pretraining.batches(0)))["loss"]
        found.append((loss, torch.cat([p.grad.flatten() for p in pretraining.parameters])))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)  # the loop adds up losses in float32
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-6, atol=1e-12)
    assert found[0][1].abs().max() > 1e-4


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["pixpro", "mae"])  # those with a state of their own
def test_a_run_killed_after_its_first_epoch_and_resumed_ends_with_the_same_weights(task_of, network, name, tmp_path):
    def run(net, task, resume: bool = False) -> Pretraining:
        pretraining = Pretraining(net, net, 6, task)
        pretraining.run(resume)
        return pretraining

    def killer(line: str) -> None:
        if "epoch 0" in line:  # which is saved before it is reported
            raise Killed

    whole = run(network(), task_of(name, folder=tmp_path / "whole"))
    task = task_of(name, folder=tmp_path / "killed")
    with pytest.raises(Killed):
        run(network(), dataclasses.replace(task, log=killer))
    resumed = run(network(), task, resume=True)
    states = [whole.model.state_dict(), resumed.model.state_dict()]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["mae", "silver"])
def test_training_lowers_the_loss(task_of, network, name):
    settings = {"pretrain": {"epochs": 2, "iterations_per_epoch": 12, "initial_lr": 0.02, "images_per_step": 2},
                "counterfactual": {"count": 1}}
    task = task_of(name, settings=settings)
    net = network()
    Pretraining(net, net, 6, task).run(resume=False)
    losses = [json.loads(line)["loss"] for line in (task.folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_mixed_precision_changes_the_loss_by_its_rounding_only(task_of, network, name):
    net = network()
    pretraining = Pretraining(net, net, 6, task_of(name, patches_per_pass=100))
    batch = next(pretraining.batches(0))
    full = pretraining.backward(batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = pretraining.backward(batch)["loss"]
    assert mixed == pytest.approx(full, rel=0.03) and mixed != full


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_survive_pickling(task_of, name):
    objective = task_of(name).objective
    assert pickle.loads(pickle.dumps(objective)) == objective
