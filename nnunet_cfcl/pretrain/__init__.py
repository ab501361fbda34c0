"""``python -m nnunet_cfcl.pretrain``, the name that torchrun is given; the command is `nnunet_cfcl.cli.pretrain`."""
