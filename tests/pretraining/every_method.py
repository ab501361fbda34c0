"""Any pretraining method as a complete, tiny task over arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, OriginalSource
from nnunet_cfcl.nnunet.segmentation_loss import NnUNetLoss
from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.pretraining.loop import Pretraining, PretrainingTask
from nnunet_cfcl.pretraining.methods import Method, MethodContext
from nnunet_cfcl.views import ViewGeometry
from tests.conftest import CasesInMemory
from tests.pretraining.conftest import tiny_network

METHODS = {method.name: method for method in vars(methods).values() if isinstance(method, Method)}
#: One of each way to draw, to embed and to compare; the others differ in the views that they are given.
DIFFERENT = ("DVD-CL", "MVD-CL", "S-DVD-CL", "S-MVD-CL", "SimCLR", "supervised", "PixPro", "MAE")
SHORT: dict[str, dict[str, Any]] = {
    "pretrain": {"epochs": 1, "iterations_per_epoch": 2, "images_per_step": 2, "points_per_image": 20,
                 "projection_hidden": 16, "projection_dim": 8},
    "counterfactual": {"count": 1},
}
PATCHES = {2: (24, 28), 3: (8, 14, 16)}


def nnunet_loss() -> NnUNetLoss:
    """Dice and cross entropy, as in a 2d plan of nnU-Net."""
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return NnUNetLoss(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss), None, None)


def make_task(
    method: str, folder: Path, reader: CasesInMemory, *, geometry: ViewGeometry | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None, scheme: str = "ZScoreNormalization",
    source: CounterfactualSource | None = None, log: Callable[[str], None] = print, seed: int = 0, **fields: Any,
) -> PretrainingTask:
    """The task of a method; ``settings`` are merged into `SHORT`, channels are the reader's, ``source`` is used where
    the method asks for counterfactuals."""
    changes = settings or {}
    merged = {key: {**SHORT.get(key, {}), **changes.get(key, {})} for key in {*SHORT, *changes}}
    resolved = resolve_settings({**merged, "seed": seed})
    channels, depth = reader.shape(reader.cases[0])[:2]
    dim = 2 if depth == 1 else 3
    geometry = geometry or ViewGeometry(PATCHES[dim], (1.0,) * dim)
    usual = AcquisitionSource(reader, resolved.acquisition, [scheme] * channels, dim)
    chosen = METHODS[method]
    return PretrainingTask(**{
        "reader": reader, "source": (source or usual) if chosen.counterfactuals else OriginalSource(),
        "objective": chosen.build(MethodContext(resolved, geometry, channels, None, nnunet_loss)),
        "geometry": geometry, "settings": resolved, "patches_per_pass": 100, "device": torch.device("cpu"),
        "workers": 0, "folder": folder, "identity": {"method": method}, "log": log, **fields,
    })


def pretraining_of(task: PretrainingTask, dropout: float = 0.0) -> Pretraining:
    """With a new network that always begins with the same weights."""
    channels = task.reader.shape(task.reader.cases[0])[0]
    network = tiny_network(task.geometry.dimensions, dropout, channels)
    return Pretraining(network, network, 6, task)


def labelled(arrays: Mapping[str, Any], labels: Callable[[Any], Any], without: Sequence[str] = ()) -> CasesInMemory:
    """A reader whose cases have the label maps that a function makes of their images (C, Z, Y, X), fully trusted."""
    maps = {}
    for case, image in arrays.items():
        if case not in without:
            found = np.asarray(labels(image), np.int16)
            maps[case] = np.stack([found, np.where(found >= 0, 100, 0)]).astype(np.int16)
    return CasesInMemory(arrays, maps)
