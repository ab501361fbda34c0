"""Masks against the truth: ``nnunet_cfcl evaluate``."""
