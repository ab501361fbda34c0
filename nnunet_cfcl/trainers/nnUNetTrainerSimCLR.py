"""SimCLR pretraining of the encoder, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerSimCLR(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: SimCLR (Chen et al. 2020, arXiv 2002.05709) on pooled encoder features; the decoder stays random."""

    method = methods.SIMCLR
