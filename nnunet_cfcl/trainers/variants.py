"""The trainers that ``-tr`` may name: a pretraining method in front of nnU-Net's own training."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining, CounterfactualTeacher
from nnunet_cfcl.trainers.finetuning import FineTuning


class nnUNetTrainerDVDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Dual-view dense counterfactual contrastive pretraining (DVD-CL, arXiv 2603.17110) in front of nnUNetTrainer."""

    method = methods.DVD_CL


class nnUNetTrainerMVDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Multi-view dense counterfactual contrastive pretraining (MVD-CL, arXiv 2603.17110) in front of nnUNetTrainer."""

    method = methods.MVD_CL


class nnUNetTrainerSDVDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Dual-view dense counterfactual contrastive pretraining with silver labels (S-DVD-CL, arXiv 2603.17110)."""

    method = methods.S_DVD_CL


class nnUNetTrainerSMVDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Multi-view dense counterfactual contrastive pretraining with silver labels (S-MVD-CL, arXiv 2603.17110)."""

    method = methods.S_MVD_CL


class nnUNetTrainerCFCLScratch(FineTuning, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: random initialisation, the same fine-tuning as after a pretraining."""


class nnUNetTrainerSimCLR(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: SimCLR (Chen et al. 2020, arXiv 2002.05709) on pooled encoder features; the decoder stays random."""

    method = methods.SIMCLR


class nnUNetTrainerCFSimCLR(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: SimCLR whose positives are counterfactuals (Roschewitz et al. 2024, arXiv 2403.09605)."""

    method = methods.CF_SIMCLR


class nnUNetTrainerVADeR(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: dense contrastive pretraining without counterfactuals (VADeR, Pinheiro et al., arXiv 2011.05499)."""

    method = methods.VADER


class nnUNetTrainerSSDCL(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: S-MVD-CL without counterfactuals (SSDCL of arXiv 2603.17110)."""

    method = methods.SSDCL


class nnUNetTrainerPixPro(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: pixel-to-propagation consistency (PixPro, Xie et al. 2021, arXiv 2011.10043)."""

    method = methods.PIX_PRO


class nnUNetTrainerMAE(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: masked autoencoding (He et al. 2021, arXiv 2111.06377; in 3D Wald et al. 2024, arXiv 2410.23132)."""

    method = methods.MAE


class nnUNetTrainerSilverSeg(CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """Baseline: supervised pretraining on silver labels with nnU-Net's own loss."""

    method = methods.SILVER_SEG


class nnUNetTrainerDVDCLTeacher(CounterfactualTeacher, CounterfactualPretraining, nnUNetTrainer):  # noqa: N801 - nnU-Net's
    """DVD-CL, nnU-Net's training, then phase 3: a teacher labels the pool, the student sees counterfactuals of it."""

    method = methods.DVD_CL


class nnUNetTrainerCFCLTeacher(CounterfactualTeacher, nnUNetTrainer):  # noqa: N801 - nnU-Net's naming
    """nnU-Net's training without pretraining, then phase 3: a teacher labels the pool."""
