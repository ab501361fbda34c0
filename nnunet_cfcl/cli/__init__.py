"""Command line ``nnunet_cfcl VERB``: one file per verb, which parses its arguments and delegates the work."""

from nnunet_cfcl.cli.main import VERBS, build_parser, main

__all__ = ["VERBS", "build_parser", "main"]
