"""Contrastive losses between points, and between images, in memory linear in the number of points.

Each file holds one loss: a pair rule, which marks the positives of an anchor, over one blockwise log-sum-exp kernel.
Every loss returns a `CountedLoss`: the scalar to minimise, with the counts that the monitor reports. The room imports
torch alone. `pseudo_label_loss` is the one segmentation loss.
"""

from nnunet_cfcl.losses.blockwise import pool_log_sum_exp, two_way_log_sum_exp
from nnunet_cfcl.losses.contrast import CountedLoss
from nnunet_cfcl.losses.dvd_cl import dvd_cl_loss
from nnunet_cfcl.losses.mvd_cl import mvd_cl_loss
from nnunet_cfcl.losses.nt_xent import nt_xent_loss
from nnunet_cfcl.losses.pseudo_label import pseudo_label_loss
from nnunet_cfcl.losses.ranks import share_blocks
from nnunet_cfcl.losses.s_dvd_cl import s_dvd_cl_loss
from nnunet_cfcl.losses.s_mvd_cl import s_mvd_cl_loss

__all__ = [
    "CountedLoss",
    "dvd_cl_loss",
    "mvd_cl_loss",
    "nt_xent_loss",
    "pool_log_sum_exp",
    "pseudo_label_loss",
    "s_dvd_cl_loss",
    "s_mvd_cl_loss",
    "share_blocks",
    "two_way_log_sum_exp",
]
