"""The pretraining loop: exact resumption, several passes, files, messages."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining import loop
from nnunet_cfcl.pretraining.loop import Pretraining
from nnunet_cfcl.runs import epochs
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from tests.runs.watching import noted_work


def _train(task, network, resume=False):
    pretraining = Pretraining(network, network, 6, task)
    pretraining.run(resume)
    return network


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def in_float64(pretraining: Pretraining) -> Pretraining:
    """The same pretraining, its views, model and inputs in double precision."""
    pretraining.model.double()
    render, inputs = pretraining.render, pretraining.objective.inputs
    pretraining._encode = lambda batch, rows: pretraining.model(
        render(batch, rows).double(), [part.double() for part in inputs(batch, rows, torch.device("cpu"))]
    )
    return pretraining


class Killed(Exception):
    """Stands in for a lost machine."""


def killed_in_its_second_epoch(pretraining: Pretraining) -> Pretraining:
    """The pretraining, which does not reach the end of its second epoch."""
    step = pretraining.step

    def run(batch, number):
        if number == 2 * pretraining.iterations - 1:
            raise Killed
        return step(batch, number)

    pretraining.step = run
    return pretraining


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_killed_in_its_second_epoch_and_resumed_ends_with_the_same_weights(make_task, network, tmp_path, dropout):
    whole = _train(make_task(folder=tmp_path / "whole"), network(dropout=dropout))
    task = make_task(folder=tmp_path / "killed")
    net = network(dropout=dropout)
    with pytest.raises(Killed):
        killed_in_its_second_epoch(Pretraining(net, net, 6, task)).run(resume=False)
    assert load_checkpoint(task.folder / "checkpoint_latest.pth")["epoch"] == 1
    (task.folder / "log.jsonl").open("a").write('{"epoch": 1, "cut sho')
    resumed = _train(task, network(dropout=dropout), resume=True)
    assert _same_weights(whole, resumed)
    lines = [json.loads(line) for line in (task.folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]


def test_pictures_logs_and_checkpoints_are_watched_too(make_task, network, tmp_path, monkeypatch):
    names = {"plot_views", "plot_progress"}
    noted, saved = noted_work(loop, names, monkeypatch), noted_work(epochs, {"save_checkpoint"}, monkeypatch)
    _train(make_task(folder=tmp_path), network())
    assert noted == {(name, True) for name in names} and saved == {("save_checkpoint", True)}


def test_pretraining_changes_the_weights_and_lowers_the_loss(make_task, network):
    settings = {"pretrain": {"epochs": 4, "iterations_per_epoch": 10, "initial_lr": 0.01}}
    task = make_task(settings)
    trained = _train(task, network())
    losses = [json.loads(line)["loss"] for line in (task.folder / "log.jsonl").read_text().splitlines()]
    assert not _same_weights(trained, network())
    assert losses[-1] < losses[0] < 2 * math.log(3 * 20) + 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_several_passes_give_the_gradients_of_one(make_task, network, dim):
    gradients = []
    for patches in (100, 4, 2, 1):
        net = network(dim).double()
        pretraining = in_float64(Pretraining(net, net, 6, make_task(dim=dim, patches_per_pass=patches)))
        pretraining.backward(next(pretraining.batches(0)))
        gradients.append(torch.cat([p.grad.flatten() for p in pretraining.parameters]))
    assert gradients[0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-12)


def test_the_run_leaves_its_files(make_task, network):
    task = make_task()
    _train(task, network())
    assert {file.name for file in task.folder.iterdir()} == {
        "checkpoint_final.pth", "log.jsonl", "progress.png", "views.png"
    }
    content = load_checkpoint(task.folder / "checkpoint_final.pth")
    assert set(content["network_weights"]) == set(network().state_dict())
    assert content["identity"] == task.identity
    line = json.loads((task.folder / "log.jsonl").read_text().splitlines()[0])
    curves = {"loss", "learning_rate", "alignment", "uniformity", "positives", "gradient_norm", "images_per_second"}
    assert set(line) >= curves
    assert line["positives"] == 1


def test_nothing_is_written_where_checkpoints_are_switched_off(make_task, network):
    task = make_task()
    _train(task, network())
    before = {file.name: file.read_bytes() for file in task.folder.iterdir()}
    (task.folder / "checkpoint_latest.pth").write_text("of another run")
    _train(dataclasses.replace(task, checkpoints=False), network())
    after = {file.name: file.read_bytes() for file in task.folder.iterdir()}
    assert after == {**before, "checkpoint_latest.pth": b"of another run"}


def test_a_learned_temperature_moves_without_weight_decay(make_task, network):
    task = make_task({"pretrain": {"learn_temperature": True, "weight_decay": 0.5}})
    net = network()
    pretraining = Pretraining(net, net, 6, task)
    groups = pretraining.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert groups[1]["params"] == list(pretraining.model.loss_parameters())
    pretraining.run(resume=False)
    temperature = float(pretraining.model.temperature())
    assert temperature != pytest.approx(0.1, abs=1e-6)
    lines = [json.loads(line) for line in (task.folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["temperature"] != lines[0]["temperature"]
    again = Pretraining(network(), network(), 6, task)
    again.model.load_additions(load_checkpoint(task.folder / "checkpoint_final.pth")["model"])
    assert float(again.model.temperature()) == pytest.approx(temperature)


def test_resuming_with_other_settings_is_rejected_with_the_differences(make_task, network):
    net = network()
    with pytest.raises(Killed):
        killed_in_its_second_epoch(Pretraining(net, net, 6, make_task())).run(resume=False)
    changed = make_task({"pretrain": {"temperature": 0.2}})
    with pytest.raises(UserError, match=r"pretrain.temperature: 0.1 then, 0.2 now\); fix: .*--c"):
        _train(changed, network(), resume=True)


def test_batch_norm_is_rejected_only_where_several_passes_are_needed(make_task):
    net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6))
    with pytest.raises(UserError, match="BatchNorm2d"):
        Pretraining(net, net, 6, make_task(patches_per_pass=4))
    Pretraining(net, net, 6, make_task(patches_per_pass=9))


def test_a_patch_too_small_for_the_views_is_rejected_before_training(make_task, network):
    task = make_task()
    tiny = dataclasses.replace(task.geometry, patch_size=(6, 6))
    with pytest.raises(UserError, match=r"views.crop_fraction"):
        Pretraining(network(), network(), 6, dataclasses.replace(task, geometry=tiny))


def test_steps_without_finite_gradients_are_skipped_and_an_epoch_of_them_is_an_error(make_task, network):
    net = network()
    with torch.no_grad():
        net[0].weight.fill_(np.inf)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match="finite gradients"):
        _train(make_task(), net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_segmentation_layers_are_not_trained(make_task):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(1, 6, 1)
            self.seg_layers = nn.ModuleList([nn.Conv2d(6, 2, 1)])

        def forward(self, x):
            return self.body(x)

    net = Net()
    body, heads = net.body.weight.clone(), net.seg_layers[0].weight.clone()
    _train(make_task(), net)
    assert not torch.equal(net.body.weight, body) and torch.equal(net.seg_layers[0].weight, heads)
