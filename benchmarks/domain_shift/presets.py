"""Presets of the study: image size, network, steps, arms, seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Size of the study of one dataset.

    Attributes:
        image_size: side of the images in pixels (chest X-rays, phantom); 0: original size.
        stages: number of resolutions of the network; 0: that of nnU-Net's plan.
        features: channels of the first stage; 0: those of nnU-Net's plan.
        batch_size: batch size of the fine-tuning; 0: that of nnU-Net's plan.
        labels: label budgets, numbers of labelled cases.
        seeds: seeds of the runs.
        arms: names in `arms.ARMS`.
        settings: nested settings of the plugin, common to all arms.
        spacing: isotropic spacing of the resampled voxels in mm; 0: that of nnU-Net's plan.
        generator: settings of the generator, which is shared by all arms that need one.
        workers: number of data loading processes; with 0 every run is bit-reproducible on a CPU.
    """

    image_size: int
    stages: int
    features: int
    batch_size: int
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    settings: Mapping[str, Any]
    workers: int
    spacing: float = 0.0
    generator: Mapping[str, Any] = field(default_factory=dict)


def _settings(
    pretraining: dict[str, Any], finetuning: dict[str, Any], sided: bool, views: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Settings for labels defined by side: no mirroring, rotation by at most 15 degrees."""
    geometry = {"mirror_axes": [], "rotation_deg": 15} if sided else {}
    # some values equal the defaults, but are part of the hashes of committed runs
    return {
        "pretrain": {"data": "training_and_pool", "temperature": 0.1, **pretraining},
        "counterfactual": {"count": 1},
        "finetune": {"initial_lr": 0.01, "val_iterations_per_epoch": 1, **geometry, **finetuning},
        "chromap": {"fit": False},
        **({"views": views} if views else {}),
    }


# the long arms have the cost of pretraining and fine-tuning together
_BASELINES = ("Scratch", "ScratchLong", "ScratchAug", "ScratchAugLong")
_NANO_ARMS = (*_BASELINES, "SilverSeg", "DVDCL@acquisition", "SMVDCL@acquisition", "DVDCL@acquisition+Aug")
_NANO_CHEST_ARMS = (
    *_NANO_ARMS, "ScratchCF@generator", "ScratchCFLong@generator", "DVDCL@generator", "DVDCL@generator+CF")
_GENERATED = tuple(f"{name}@generator" for name in ("CFSimCLR", "DVDCL", "MVDCL", "SDVDCL", "SMVDCL"))
_ACQUIRED = tuple(name.replace("generator", "acquisition") for name in _GENERATED)
_FULL_ARMS = (
    *_BASELINES, "ScratchCF@generator", "ScratchCFLong@generator", "SilverSeg", "SimCLR", "VADeR", "SSDCL", "MAE",
    *_GENERATED, *_ACQUIRED, "DVDCL@acquisition+Aug", "SMVDCL@acquisition+Aug", "DVDCL@generator+CF",
)
_TRUE_ARMS = (
    *_BASELINES, "ScratchCF@generator", "ScratchCF@precomputed", "DVDCL@acquisition", "DVDCL@acquisition+Aug",
    "DVDCL@generator", "DVDCL@generator+CF", "DVDCL@precomputed", "DVDCL@precomputed+CF",
)
_PHANTOM_ARMS = tuple(dict.fromkeys((*_FULL_ARMS, *_TRUE_ARMS)))

# chosen on the development half of the chest X-rays, one seed: see docs/results/chest_xrays_nano.md
_FROZEN, _VIEWS = {"frozen_fraction": 0.25}, {"crop_fraction": [0.3, 1.0]}
_NANO_2D = _settings(
    {"epochs": 8, "iterations_per_epoch": 50, "images_per_step": 4, "points_per_image": 128},
    {"epochs": 8, "iterations_per_epoch": 50, **_FROZEN}, sided=True, views=_VIEWS)
# coarse and long enough for nnU-Net to learn both labels within minutes on one core
_NANO_3D = _settings(
    {"epochs": 6, "iterations_per_epoch": 50, "images_per_step": 4, "points_per_image": 128},
    {"epochs": 12, "iterations_per_epoch": 50, **_FROZEN}, sided=False, views=_VIEWS)
# half an hour on one core, the gate included; the defaults are meant for a GPU
_NANO_GENERATOR = {"width": 12, "blocks": 1, "images_per_step": 8, "epochs": 20, "iterations_per_epoch": 100,
                   "ema": 0.998, "finetune_epochs": 4}
_FULL_2D = _settings(
    {"epochs": 40, "iterations_per_epoch": 250, "images_per_step": 16, "points_per_image": 500},
    {"epochs": 60, "iterations_per_epoch": 100}, sided=True)
_FULL_3D = _settings(
    {"epochs": 40, "iterations_per_epoch": 100, "images_per_step": 8, "points_per_image": 500},
    {"epochs": 60, "iterations_per_epoch": 100}, sided=False)

#: (preset, dataset) -> size.
PRESETS: dict[tuple[str, str], Preset] = {
    ("nano", "chest_xrays"): Preset(96, 4, 16, 8, (12,), (0, 1, 2), _NANO_CHEST_ARMS, _NANO_2D, workers=0,
                                    generator=_NANO_GENERATOR),
    ("nano", "hippocampus"): Preset(0, 3, 16, 4, (12,), (0, 1, 2), _NANO_ARMS, _NANO_3D, workers=0, spacing=1.5),
    ("nano", "phantom"): Preset(96, 4, 16, 8, (12,), (0, 1, 2), _TRUE_ARMS, _NANO_2D, workers=0,
                                generator={**_NANO_GENERATOR, "mirror_axes": [1]}),
    ("full", "chest_xrays"): Preset(256, 0, 0, 0, (6, 12, 24), (0, 1, 2, 3, 4), _FULL_ARMS, _FULL_2D, workers=8),
    ("full", "hippocampus"): Preset(0, 0, 0, 0, (6, 12, 24), (0, 1, 2, 3, 4), _FULL_ARMS, _FULL_3D, workers=8),
    ("full", "phantom"): Preset(128, 0, 0, 0, (12,), (0, 1, 2, 3, 4), _PHANTOM_ARMS, _FULL_2D, workers=8),
}
