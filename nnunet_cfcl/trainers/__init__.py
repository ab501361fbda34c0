"""The trainers a user names with ``-tr``: thin classes, their attributes are what differs."""

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
