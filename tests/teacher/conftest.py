"""A complete, tiny phase 3 over arrays in memory: bright squares on two scanners, of which one is labelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource
from nnunet_cfcl.losses import pseudo_label_loss
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.teacher import loop
from nnunet_cfcl.teacher.loop import TeacherTraining
from nnunet_cfcl.teacher.task import TeacherTask
from nnunet_cfcl.views import ViewGeometry
from tests.conftest import CasesInMemory

TINY = {"views.rotation_deg": 10, "teacher.mix_probability": 0.7, "teacher.intensity_probability": 1.0}


class TwoOutputs(nn.Module):
    """Logits at full and half resolution, as nnU-Net's networks return under deep supervision."""

    def __init__(self, dim: int = 2, heads: int = 2) -> None:
        super().__init__()
        conv, pool = (nn.Conv2d, nn.AvgPool2d) if dim == 2 else (nn.Conv3d, nn.AvgPool3d)
        self.body = nn.Sequential(conv(1, 6, 3, padding=1), nn.LeakyReLU())
        self.fine, self.coarse, self.pool = conv(6, heads, 1), conv(6, heads, 1), pool(2)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.body(images)
        return [self.fine(features), self.coarse(self.pool(features))]


def squares(dim: int = 2, count: int = 6) -> CasesInMemory:
    """Bright squares (cubes) on noise; cases 3 and later are darker, the other scanner."""
    random, shape = np.random.default_rng(0), (1, 24, 28) if dim == 2 else (16, 18, 20)
    images = {}
    for number in range(count):
        image = random.normal(size=(1, *shape)) * 0.1
        image[..., 6:16, 8:18] += 2.0 if number < 3 else 1.2
        images[f"case_{number}"] = image
    return CasesInMemory(images)


def labelled_batches(dim: int = 2) -> Iterator[dict[str, Any]]:
    """Endless batches of squares at random places, drawn from the global generator as nnU-Net's loader does."""
    patch = (16, 20) if dim == 2 else (8, 12, 12)
    while True:
        data = 0.1 * torch.randn(2, 1, *patch)
        target = torch.zeros(2, 1, *patch, dtype=torch.int16)
        low = int(torch.randint(4, ()))
        data[..., low : low + 6, 4:12] += 2
        target[..., low : low + 6, 4:12] = 1
        half = [slice(None), slice(None), *[slice(None, None, 2)] * dim]
        yield {"data": data, "target": [target, target[tuple(half)]]}


def supervised(outputs: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """A loss like nnU-Net's under deep supervision."""
    weighted = [weight * pseudo_label_loss(one, truth, torch.ones_like(truth, dtype=torch.bool))
                for weight, one, truth in zip((2 / 3, 1 / 3), outputs, target)]
    return torch.stack(weighted).sum()


def tiny_training(
    folder: Path, settings: dict[str, Any] | None = None, dim: int = 2, network: nn.Module | None = None,
    ranks: Ranks = Ranks(), **fields: Any,  # noqa: B008 - frozen
) -> TeacherTraining:
    """A training whose fields may be replaced."""
    resolved = resolve_settings({**TINY, **(settings or {})})
    reader = squares(dim)
    geometry = ViewGeometry((16, 20) if dim == 2 else (8, 12, 12), (1.0,) * dim)
    task = {
        "settings": resolved, "device": torch.device("cpu"), "workers": 0, "folder": folder, "log": lambda line: None,
        "identity": {"settings": resolved.to_dict()}, "ranks": ranks, "reader": reader,
        "groups": {"a": reader.cases[:2], "b": reader.cases[3:]},
        "source": AcquisitionSource(reader, resolved.acquisition, ["ZScoreNormalization"], dim), "geometry": geometry,
        "labelled": labelled_batches(dim), "segmentation_loss": supervised, "output_weights": (2 / 3, 1 / 3),
        "heads": ["background", "square"], "regions": False, "expected_shares": torch.tensor([0.8, 0.2]),
        "epochs": 3, "iterations": 2, "images_per_step": 4, **fields}
    torch.manual_seed(0)
    network = network or TwoOutputs(dim)
    return TeacherTraining(network, network, torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9),
                           TeacherTask(**task))


@pytest.fixture
def make_training(tmp_path, monkeypatch):
    """`tiny_training` in a folder of the test, named by ``folder``; its pictures, which take longer than a tiny
    training, are empty files."""
    monkeypatch.setattr(loop, "plot_progress", lambda lines, file: file.touch())
    monkeypatch.setattr(loop, "plot_pseudo_labels", lambda weak, strong, pseudo, file: file.touch())
    return lambda folder="teacher", **fields: tiny_training(tmp_path / folder, **fields)
