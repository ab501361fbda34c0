"""MAE pretraining, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerMAE(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: masked autoencoding (He et al. 2021, arXiv 2111.06377; in 3D Wald et al. 2024, arXiv 2410.23132)."""

    method = methods.MAE
