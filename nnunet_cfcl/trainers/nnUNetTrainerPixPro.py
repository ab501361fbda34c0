"""PixPro pretraining, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerPixPro(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: pixel-to-propagation consistency (PixPro, Xie et al. 2021, arXiv 2011.10043)."""

    method = methods.PIX_PRO
