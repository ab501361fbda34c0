"""Pretraining metrics in nnU-Net's own experiment loggers (W&B, with ``nnUNet_wandb_enabled=1``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

PREFIX = "cfcl"
#: Takes the metrics of one epoch of the pretraining.
Track = Callable[[Mapping[str, float]], None]


class LaterLogger:
    """One of nnU-Net's experiment loggers, with its steps shifted behind the pretraining's.

    W&B drops values of earlier steps, so both phases share one axis of epochs: first the pretraining's, then nnU-Net's.

    Args:
        logger: nnU-Net's logger.
        epochs: number of pretraining epochs.
    """

    def __init__(self, logger: Any, epochs: int) -> None:
        self.logger, self._epochs = logger, epochs

    def log(self, key: str, value: Any, step: int) -> None:
        """Log a value of an epoch of nnU-Net's training."""
        self.logger.log(key, value, step + self._epochs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.logger, name)


def put_after_pretraining(trainer: nnUNetTrainer, epochs: int) -> None:
    """Shift nnU-Net's experiment loggers behind the pretraining's epochs, and log the settings."""
    # before 2.7 nnU-Net has none
    loggers = getattr(trainer.logger, "loggers", None)
    if loggers is None:
        return
    trainer.logger.loggers = [LaterLogger(logger, epochs) for logger in loggers]
    for logger in loggers:
        # W&B rejects changed values in a continued run unless told otherwise
        if hasattr(logger, "run"):
            logger.run.config.update({PREFIX: trainer.settings.to_dict()}, allow_val_change=True)


def pretraining_tracker(trainer: nnUNetTrainer) -> Track:
    """Return a function that logs the metrics of a pretraining epoch, each as ``cfcl/NAME`` at that epoch.

    Args:
        trainer: after `put_after_pretraining`.
    """
    loggers = [one.logger for one in getattr(getattr(trainer, "logger", None), "loggers", ())]

    def track(line: Mapping[str, float]) -> None:
        for logger in loggers:
            for key, value in line.items():
                if key != "epoch":
                    logger.log(f"{PREFIX}/{key}", value, int(line["epoch"]))

    return track


def track_nothing(line: Mapping[str, float]) -> None:
    """No experiment loggers."""
