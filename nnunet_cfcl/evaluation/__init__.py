"""How good masks are, per case, label and group, and whether another method's are better: ``nnunet_cfcl evaluate``."""
