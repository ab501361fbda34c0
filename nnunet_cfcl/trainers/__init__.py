"""The trainers a user names with ``-tr``: thin classes, their attributes are what differs."""

from nnunet_cfcl.trainers.counterfactual_pretraining import CounterfactualPretraining
from nnunet_cfcl.trainers.nnUNetTrainerDVDCL import nnUNetTrainerDVDCL

__all__ = ["CounterfactualPretraining", "nnUNetTrainerDVDCL"]
