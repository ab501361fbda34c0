"""The trainers that ``nnUNetv2_train -tr`` names: pretraining in front of nnU-Net's own training.

A trainer is a class of one attribute, its ``method``, on top of `CounterfactualPretraining` and any nnU-Net trainer.
`nnunet_cfcl.trainers.lookup` finds trainers by name.
"""

from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining
from nnunet_cfcl.trainers.variants import (
    nnUNetTrainerCFCLScratch,
    nnUNetTrainerCFSimCLR,
    nnUNetTrainerDVDCL,
    nnUNetTrainerMAE,
    nnUNetTrainerMVDCL,
    nnUNetTrainerPixPro,
    nnUNetTrainerSDVDCL,
    nnUNetTrainerSilverSeg,
    nnUNetTrainerSimCLR,
    nnUNetTrainerSMVDCL,
    nnUNetTrainerSSDCL,
    nnUNetTrainerVADeR,
)

__all__ = [
    "CounterfactualPretraining",
    "nnUNetTrainerCFCLScratch",
    "nnUNetTrainerCFSimCLR",
    "nnUNetTrainerDVDCL",
    "nnUNetTrainerMAE",
    "nnUNetTrainerMVDCL",
    "nnUNetTrainerPixPro",
    "nnUNetTrainerSDVDCL",
    "nnUNetTrainerSMVDCL",
    "nnUNetTrainerSSDCL",
    "nnUNetTrainerSilverSeg",
    "nnUNetTrainerSimCLR",
    "nnUNetTrainerVADeR",
]
