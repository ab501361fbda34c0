"""Import path of the CHRO-map hook for shims that ``nnunet_cfcl install`` of an earlier version wrote."""

from nnunet_cfcl.chromap.nnunet.hook import offer_chromaps

__all__ = ["offer_chromaps"]
