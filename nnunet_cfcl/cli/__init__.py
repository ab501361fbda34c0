"""The command ``nnunet_cfcl``: one file per verb."""

from nnunet_cfcl.cli.main import VERBS, build_parser, main

__all__ = ["VERBS", "build_parser", "main"]
