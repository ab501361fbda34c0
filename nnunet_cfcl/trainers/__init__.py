"""The trainers a user names with ``-tr``: thin classes, their attributes are what differs."""

from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining
from nnunet_cfcl.trainers.nnUNetTrainerCFCLScratch import nnUNetTrainerCFCLScratch
from nnunet_cfcl.trainers.nnUNetTrainerCFSimCLR import nnUNetTrainerCFSimCLR
from nnunet_cfcl.trainers.nnUNetTrainerDVDCL import nnUNetTrainerDVDCL
from nnunet_cfcl.trainers.nnUNetTrainerMAE import nnUNetTrainerMAE
from nnunet_cfcl.trainers.nnUNetTrainerMVDCL import nnUNetTrainerMVDCL
from nnunet_cfcl.trainers.nnUNetTrainerPixPro import nnUNetTrainerPixPro
from nnunet_cfcl.trainers.nnUNetTrainerSDVDCL import nnUNetTrainerSDVDCL
from nnunet_cfcl.trainers.nnUNetTrainerSilverSeg import nnUNetTrainerSilverSeg
from nnunet_cfcl.trainers.nnUNetTrainerSimCLR import nnUNetTrainerSimCLR
from nnunet_cfcl.trainers.nnUNetTrainerSMVDCL import nnUNetTrainerSMVDCL
from nnunet_cfcl.trainers.nnUNetTrainerSSDCL import nnUNetTrainerSSDCL
from nnunet_cfcl.trainers.nnUNetTrainerVADeR import nnUNetTrainerVADeR

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
