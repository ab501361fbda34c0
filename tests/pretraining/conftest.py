"""A complete, tiny pretraining task over arrays in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource
from nnunet_cfcl.pretraining.loop import PretrainingTask
from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.views import ViewGeometry

TINY = {
    "pretrain": {"epochs": 2, "iterations_per_epoch": 2, "images_per_step": 3, "points_per_image": 20,
                 "projection_hidden": 16, "projection_dim": 8},
    "counterfactual": {"count": 2},
}


def tiny_network(dim: int = 2, dropout: float = 0.0, channels: int = 1) -> nn.Module:
    """A feature extractor of width 6 with the norm and the optional dropout of nnU-Net's networks."""
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    drop = nn.Dropout2d if dim == 2 else nn.Dropout3d
    torch.manual_seed(3)
    first = conv(channels, 6, 3, padding=1)
    return nn.Sequential(first, norm(6, affine=True), nn.LeakyReLU(), drop(dropout), conv(6, 6, 1))


@pytest.fixture
def network():
    return tiny_network


@pytest.fixture
def make_task(tmp_path, cases_in_memory):
    """Factory of tasks; keyword arguments replace fields, ``settings`` is merged into `TINY`."""

    def make(settings: dict | None = None, dim: int = 2, reader=None, **fields) -> PretrainingTask:
        merged = {key: {**TINY.get(key, {}), **(settings or {}).get(key, {})} for key in {*TINY, *(settings or {})}
                  if key != "seed"}
        resolved = resolve_settings({**merged, "seed": (settings or {}).get("seed", 0)})
        reader = reader or cases_in_memory((1, 1, 40, 44) if dim == 2 else (1, 20, 24, 22))
        geometry = ViewGeometry((24, 28) if dim == 2 else (12, 14, 16), (1.0,) * dim)
        source = AcquisitionSource(reader, resolved.acquisition, ["ZScoreNormalization"], dim)
        objective = DualViewObjective(resolved.pretrain.points_per_image)
        messages: list[str] = []
        defaults = {
            "reader": reader, "source": source, "objective": objective, "geometry": geometry, "settings": resolved,
            "patches_per_pass": 4, "device": torch.device("cpu"), "workers": 0, "folder": tmp_path / "pretraining",
            "identity": {"settings": resolved.to_dict()}, "log": messages.append,
        }
        return PretrainingTask(**{**defaults, **fields})

    return make
