"""nnU-Net's W&B switch: both phases in one run, through nnU-Net's own logger, with W&B's rules about steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.training.logging import nnunet_logger

from nnunet_cfcl.trainers import nnUNetTrainerCFCLScratch, nnUNetTrainerDVDCL

pytestmark = pytest.mark.end_to_end


class Config(dict):
    """As W&B's: values change only where that is allowed."""

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:
        changed = [key for key, value in values.items() if key in self and self[key] != value]
        assert allow_val_change or not changed, changed
        super().update(values)


class StrictRun:
    """As W&B's, but what W&B would drop with a warning is an error."""

    def __init__(self) -> None:
        self.step, self.rows = 0, dict[int, dict[str, Any]]()
        self.config, self.summary = Config(), dict[str, Any]()

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= self.step, f"{values} at step {step} after step {self.step}"
        self.step = step
        self.rows.setdefault(step, {}).update(values)


@pytest.fixture
def run(monkeypatch) -> StrictRun:
    found = StrictRun()
    monkeypatch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=lambda **arguments: found))
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    return found


def test_the_pretrainings_epochs_come_before_those_of_nnunet_in_one_run(make_trainer, run):
    trainer = make_trainer(nnUNetTrainerDVDCL, pretrain={"epochs": 2}, finetune={"epochs": 1})
    trainer.run_training()
    pretraining = {"cfcl/loss", "cfcl/alignment", "cfcl/uniformity", "cfcl/learning_rate", "cfcl/gradient_norm"}
    assert pretraining <= run.rows[0].keys() and pretraining <= run.rows[1].keys()
    assert {"train_losses", "val_losses", "lrs"} <= run.rows[2].keys()
    assert set(run.rows) == {0, 1, 2} and "train_losses" not in run.rows[0]
    assert run.config["cfcl"]["pretrain"]["epochs"] == 2
    # nnU-Net's own record, which checkpoints hold, begins with its own first epoch
    assert len(trainer.logger.get_value("train_losses", step=None)) == 1


def test_a_continued_run_may_have_other_settings(make_trainer, run):
    make_trainer(nnUNetTrainerCFCLScratch, finetune={"epochs": 1})
    make_trainer(nnUNetTrainerCFCLScratch, continues=True, finetune={"epochs": 2})
    assert run.config["cfcl"]["finetune"]["epochs"] == 2


def test_without_a_pretraining_steps_are_nnunets(make_trainer, run):
    make_trainer(nnUNetTrainerCFCLScratch, finetune={"epochs": 1}).run_training()
    assert set(run.rows) == {0} and "train_losses" in run.rows[0]
