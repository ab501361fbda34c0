"""Hands the trainers of the installed package nnunet_cfcl to nnU-Net's look-up.

The package is imported only when one of its trainers is asked for: whatever is wrong with it, stock nnU-Net goes on.
"""

import sys

TRAINERS = ('nnUNetTrainerCFCLScratch', 'nnUNetTrainerCFSimCLR', 'nnUNetTrainerDVDCL', 'nnUNetTrainerMAE', 'nnUNetTrainerMVDCL', 'nnUNetTrainerPixPro', 'nnUNetTrainerSDVDCL', 'nnUNetTrainerSMVDCL', 'nnUNetTrainerSSDCL', 'nnUNetTrainerSilverSeg', 'nnUNetTrainerSimCLR', 'nnUNetTrainerVADeR')


def __getattr__(name):
    if name not in TRAINERS:
        raise AttributeError(name)
    try:
        import nnunet_cfcl
    except ModuleNotFoundError:
        print(f"{name} belongs to nnunet_cfcl, which is not installed here any more: install it again, or remove "
              f"the folder {__file__.rpartition('trainer_shim')[0]}", file=sys.stderr)
        raise AttributeError(name) from None
    import nnunet_cfcl.trainers
    from nnunet_cfcl.nnunet.chromap_hook import offer_chromaps
    offer_chromaps()
    return getattr(nnunet_cfcl.trainers, name)
