"""CF-SimCLR pretraining of the encoder, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerCFSimCLR(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: SimCLR whose positives are counterfactuals (Roschewitz et al. 2024, arXiv 2403.09605)."""

    method = methods.CF_SIMCLR
