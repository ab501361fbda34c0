"""One HTML page about a fold, or several: ``nnunet_cfcl report``."""
