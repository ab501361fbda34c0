"""S-MVD-CL pretraining, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerSMVDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Multi-view dense counterfactual contrastive pretraining with silver labels (S-MVD-CL, arXiv 2603.17110)."""

    method = methods.S_MVD_CL
