"""The toy dataset in nnU-Net's folders, with attributes, and short settings."""


import pytest
import torch

from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.trainers.lookup import find_trainer
from tests.toy_dataset import CASES, DATASET

SHORT = {
    "pretrain": {"epochs": 1, "iterations_per_epoch": 1, "images_per_step": 2, "points_per_image": 20},
    "generator": {"epochs": 1, "iterations_per_epoch": 1, "images_per_step": 2, "width": 4, "blocks": 1,
                  "finetune_epochs": 1},
    "counterfactual": {"interventions": ["scanner"], "count": 1},
    "gate": {"enabled": False, "predictor_steps": 1, "segmenter_steps": 1, "cases": 2},
}


@pytest.fixture
def change_settings(settings_file):
    """A function that writes `SHORT` with changed sections."""
    return settings_file(SHORT)


@pytest.fixture
def write_attributes(toy):
    """A function that gives cases the scanners A and B in turn, and patients of their own."""

    def write(cases=CASES):
        rows = "".join(f"{case},{'AB'[number % 2]},p{number}\n" for number, case in enumerate(cases))
        (toy / "nnUNet_raw" / DATASET / "attributes.csv").write_text("case,scanner,patient\n" + rows)

    return write


@pytest.fixture
def lines():
    """What the folds of this test have logged."""
    return []


@pytest.fixture
def make_fold(change_settings, write_attributes, lines):
    """Factory: (name of the trainer) -> context of fold "all", which logs to ``lines``."""
    write_attributes()

    def make(name="nnUNetTrainerDVDCL"):
        return FoldContext.find(find_trainer(name), DATASET, "2d", "all", "nnUNetPlans", torch.device("cpu"),
                                lambda *line, **ignored: lines.append(" ".join(map(str, line))))

    return make
