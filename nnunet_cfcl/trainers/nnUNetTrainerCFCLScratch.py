"""No pretraining: nnU-Net's own training from random weights, with the settings of the others' second phase."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.trainers.finetuning import FineTuning


class nnUNetTrainerCFCLScratch(FineTuning, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: random initialisation, the same fine-tuning as after a pretraining."""
