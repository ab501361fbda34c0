"""``nnunet_cfcl doctor``: what is wrong with an installation, a plan, the data or the device."""
