"""Contrastive objectives: one file each, made of a rule that says which pairs are positive and one blockwise kernel."""

from nnunet_cfcl.losses.blockwise import pool_log_sum_exp, two_way_log_sum_exp
from nnunet_cfcl.losses.contrast import CountedLoss
from nnunet_cfcl.losses.dvd_cl import dvd_cl_loss, dvd_cl_loss_with_count
from nnunet_cfcl.losses.mvd_cl import mvd_cl_loss, mvd_cl_loss_with_count
from nnunet_cfcl.losses.nt_xent import nt_xent_loss, nt_xent_loss_with_count
from nnunet_cfcl.losses.ranks import share_blocks
from nnunet_cfcl.losses.s_dvd_cl import s_dvd_cl_loss, s_dvd_cl_loss_with_count
from nnunet_cfcl.losses.s_mvd_cl import s_mvd_cl_loss, s_mvd_cl_loss_with_count

__all__ = [
    "CountedLoss",
    "dvd_cl_loss",
    "dvd_cl_loss_with_count",
    "mvd_cl_loss",
    "mvd_cl_loss_with_count",
    "nt_xent_loss",
    "nt_xent_loss_with_count",
    "pool_log_sum_exp",
    "s_dvd_cl_loss",
    "s_dvd_cl_loss_with_count",
    "s_mvd_cl_loss",
    "s_mvd_cl_loss_with_count",
    "share_blocks",
    "two_way_log_sum_exp",
]
