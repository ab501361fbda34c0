"""One seed, one device, one set of settings: the same weights, bit for bit, with and without worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_cfcl.nnunet.decoder_tap import tapped
from nnunet_cfcl.pretraining import loop
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.loop import Pretraining
from tests.nnunet.test_decoder_tap import PlainConvUNet, build
from tests.pretraining.every_method import METHODS, make_task, pretraining_of
from tests.pretraining.unusual_inputs import UnusualInput, volume

#: Two epochs, so that one is saved and gone on from; several passes, so that random states are replayed.
TWENTY_STEPS: dict[str, Any] = {"pretrain": {"epochs": 2, "iterations_per_epoch": 10}}
DROPOUT = 0.3


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the training."""
    monkeypatch.setattr(loop, "plot_progress", lambda epochs, file: file.touch())
    monkeypatch.setattr(loop, "plot_views", lambda *arguments: None)


def weights_after(method: str, folder: Path, workers: int, seed: int = 0) -> dict[str, Tensor]:
    """All that twenty steps leave in the model."""
    reader = UnusualInput("as usual").reader()
    task = make_task(method, folder, reader, settings=TWENTY_STEPS, seed=seed, workers=workers, patches_per_pass=3)
    pretraining = pretraining_of(task, DROPOUT)
    pretraining.run(resume=False)
    return pretraining.model.state_dict()


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert list(one) == list(other)
    return [key for key, value in one.items() if not torch.equal(value, other[key])]


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_give_the_same_weights_again_and_with_worker_processes(method, tmp_path):
    first = weights_after(method, tmp_path / "first", workers=0)
    torch.manual_seed(1234)  # what was drawn before, by whomever, must not matter
    assert differences(first, weights_after(method, tmp_path / "again", workers=0)) == []
    assert differences(first, weights_after(method, tmp_path / "workers", workers=2)) == []


def test_another_seed_gives_other_weights(tmp_path):
    one, other = (weights_after("DVD-CL", tmp_path / str(seed), workers=0, seed=seed) for seed in (0, 1))
    assert len(differences(one, other)) == len(one)


def test_nnunets_network_is_trained_to_the_same_bits_too(tmp_path):
    """Strided and transposed convolutions, and the tap."""
    found = []
    for workers in (0, 2):
        network = build(PlainConvUNet, 2, True)
        task = make_task("S-MVD-CL", tmp_path / str(workers), UnusualInput("as usual").reader(),
                         settings=TWENTY_STEPS, workers=workers, patches_per_pass=3)
        with tapped(network, task.objective.tap) as part:
            Pretraining(part.network, part.features, part.width, task).run(resume=False)
        found.append(network.state_dict())
    assert differences(*found) == []


@pytest.mark.parametrize("image", [UnusualInput("as usual").image, volume])
def test_what_is_drawn_does_not_depend_on_the_number_of_threads(image, tmp_path):
    """Worker processes have one thread each, the main process, which draws where there are none, has many."""
    drawn = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        task = make_task("S-MVD-CL", tmp_path, UnusualInput("as usual", image).reader(),
                         settings={"pretrain": {"points_per_image": 1000}, "views": {"crop_fraction": (0.3, 1.0)}})
        dataset = PretrainingDataset(
            task.reader, task.source, task.objective, task.geometry, task.settings, steps=4)
        drawn.append([flat(dataset[index]) for index in range(6)])
    assert all(torch.equal(a, b) for one, other in zip(*drawn, strict=True) for a, b in zip(one, other, strict=True))


def flat(sample: Any) -> list[Tensor]:
    if isinstance(sample, Tensor):
        return [sample]
    parts = sample.values() if isinstance(sample, dict) else sample
    return [tensor for part in parts for tensor in flat(part)]
