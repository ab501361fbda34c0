"""The trainers of nnunet_cfcl under the eyes of nnU-Net's look-up.

nnU-Net imports every module of this folder and forgets it again. A class defined here could not be pickled for worker
processes; a class of the installed package can, so this module only passes them on.
"""

from nnunet_cfcl.chromap.nnunet.hook import offer_chromaps
from nnunet_cfcl.trainers import *  # noqa: F403

offer_chromaps()
