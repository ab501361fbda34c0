"""The trainers that ``nnUNetv2_train -tr`` names: pretraining in front of nnU-Net's own training.

A trainer is a class of one attribute, its ``method``, on top of `CounterfactualPretraining` and any nnU-Net trainer;
`CounterfactualTeacher` lets phase 3 follow.
`nnunet_cfcl.trainers.lookup` finds trainers by name.
"""

from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining, CounterfactualTeacher
from nnunet_cfcl.trainers.variants import (
    nnUNetTrainerCFCLScratch,
    nnUNetTrainerCFCLTeacher,
    nnUNetTrainerCFSimCLR,
    nnUNetTrainerDVDCL,
    nnUNetTrainerDVDCLTeacher,
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
    "CounterfactualTeacher",
    "nnUNetTrainerCFCLScratch",
    "nnUNetTrainerCFCLTeacher",
    "nnUNetTrainerCFSimCLR",
    "nnUNetTrainerDVDCL",
    "nnUNetTrainerDVDCLTeacher",
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
