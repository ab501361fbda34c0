"""Contrastive objectives on embeddings of points: one file per objective, on one blockwise kernel."""

from nnunet_cfcl.losses.blockwise import two_way_log_sum_exp
from nnunet_cfcl.losses.dvd_cl import dvd_cl_loss

__all__ = ["dvd_cl_loss", "two_way_log_sum_exp"]
