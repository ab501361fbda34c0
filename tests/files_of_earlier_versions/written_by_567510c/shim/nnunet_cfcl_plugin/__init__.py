"""Written by `nnunet_cfcl install` 0.1.0; `nnunet_cfcl uninstall` removes this folder."""
