"""Where a shim that an earlier version's ``nnunet_cfcl install`` wrote looks for the hook."""

from nnunet_cfcl.chromap.nnunet.hook import offer_chromaps

__all__ = ["offer_chromaps"]
