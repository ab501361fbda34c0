"""S-DVD-CL pretraining, then nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining


class nnUNetTrainerSDVDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Dual-view dense counterfactual contrastive pretraining with silver labels (S-DVD-CL, arXiv 2603.17110)."""

    method = methods.S_DVD_CL
