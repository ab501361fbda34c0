"""VADeR pretraining, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerVADeR(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: dense contrastive pretraining without counterfactuals (VADeR, Pinheiro et al., arXiv 2011.05499)."""

    method = methods.VADER
