"""Size of the demo, and the settings of its trainings: nnU-Net as it is, the plugin, and a small 3D run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STOCK, PLUGIN, VOLUMES = "stock", "plugin", "3d"
STOCK_TRAINER, PRETRAINER = "nnUNetTrainerCFCLScratch", "nnUNetTrainerDVDCL"
TEACHER = "nnUNetTrainerCFCLTeacher"


@dataclass(frozen=True)
class DemoSize:
    """Size of the demo.

    Attributes:
        labelled: number of labelled patients, all of scanner A.
        pool: number of unlabelled images, of both scanners.
        test: number of test patients, each on both scanners.
        image: side of the images in pixels.
        stages: number of resolutions of the network.
        features: channels of its first resolution.
        batch: images per step.
        epochs: number of epochs of nnU-Net's training before phase 3.
        later: number of epochs of phase 3, or of pretraining where there is no pool.
        iterations: optimiser steps per epoch.
        volume: shape of the volumes of the 3D run.
        volume_steps: optimiser steps of each phase of the 3D run.
    """

    labelled: int = 12
    pool: int = 40
    test: int = 10
    image: int = 96
    stages: int = 4
    features: int = 16
    batch: int = 8
    epochs: int = 18
    later: int = 6
    iterations: int = 20
    volume: tuple[int, int, int] = (32, 48, 48)
    volume_steps: int = 4

    @property
    def steps(self) -> int:
        """Optimiser steps of each of the two models."""
        return (self.epochs + self.later) * self.iterations


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        name: name of the model in folders and in the picture.
        trainer: name after ``-tr``.
        settings: nested settings of the plugin.
        summary: its training in words.
    """

    name: str
    trainer: str
    settings: dict[str, Any]
    summary: str


def stock(size: DemoSize) -> Recipe:
    """NnU-Net's own training with a set number of steps."""
    settings = {"finetune": _finetuning(size, size.epochs + size.later), "chromap": {"fit": False}}
    return Recipe(STOCK, STOCK_TRAINER, settings, f"{size.steps} steps of its own training on the labelled images")


def plugin(size: DemoSize, pool: bool, true_counterfactuals: bool) -> Recipe:
    """Recipe of the plugin with as many optimiser steps as `stock`.

    Args:
        size: size of the demo.
        pool: whether there are unlabelled images, from which phase 3 learns.
        true_counterfactuals: whether they were imported; otherwise acquisition effects take their place.
    """
    source = "precomputed" if true_counterfactuals else "acquisition"
    probability = "counterfactual_probability" if true_counterfactuals else "acquisition_probability"
    first, second = size.epochs * size.iterations, size.later * size.iterations
    settings: dict[str, Any] = {
        "counterfactual": {"source": source, "count": 1},
        "finetune": {**_finetuning(size, size.epochs), probability: 0.5},
        # UMAP takes longer to compile itself than the maps take
        "chromap": {"reducer": "pca", "samples": 4000},
    }
    shown = "counterfactuals" if true_counterfactuals else "acquisition effects"
    if pool:
        # the phase is short: views that are hard to learn would cost more than they teach
        settings["teacher"] = {"epochs": size.later, "intensity_probability": 0}
        return Recipe(PLUGIN, TEACHER, settings, f"{first} steps on the labelled images and their {shown}, then "
                      f"{second} steps with a teacher that labels the pool")
    settings["pretrain"] = {**_pretraining(size.later, size.iterations), "images_per_step": 4}
    return Recipe(PLUGIN, PRETRAINER, settings, f"{second} steps of pretraining, then {first} steps on the labelled "
                  f"images and their {shown}")


def volumes(size: DemoSize) -> Recipe:
    """A few steps of pretraining and training in 3D."""
    finetuning = {"epochs": 1, "iterations_per_epoch": size.volume_steps, "val_iterations_per_epoch": 1}
    settings = {"counterfactual": {"source": "acquisition", "count": 1}, "pretrain": _pretraining(1, size.volume_steps),
                "finetune": finetuning, "chromap": {"fit": False}}
    return Recipe(VOLUMES, PRETRAINER, settings, f"{2 * size.volume_steps} steps")


def _finetuning(size: DemoSize, epochs: int) -> dict[str, Any]:
    return {"epochs": epochs, "iterations_per_epoch": size.iterations, "val_iterations_per_epoch": 1}


def _pretraining(epochs: int, iterations: int) -> dict[str, Any]:
    return {"epochs": epochs, "iterations_per_epoch": iterations, "images_per_step": 2, "points_per_image": 500}
