"""Frozen features: ``nnunet_cfcl probe``."""
