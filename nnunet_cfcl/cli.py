"""The command ``nnunet_cfcl VERB``.

Every room brings its own verbs: a function ``add_..._parser(subparsers)`` that adds one sub-parser and sets its default
``run``, a function of the parsed arguments that returns the exit status. A room is imported when its verb is typed, so
that light verbs stay fast.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence

import nnunet_cfcl
from nnunet_cfcl.errors import UserError

VERBS = {
    "trainers-path": "nnunet_cfcl.nnunet.installation:add_trainers_path_parser",
    "install": "nnunet_cfcl.nnunet.installation:add_install_parser",
    "uninstall": "nnunet_cfcl.nnunet.installation:add_uninstall_parser",
    "doctor": "nnunet_cfcl.nnunet.doctor:add_doctor_parser",
    "export-stock": "nnunet_cfcl.nnunet.export_stock:add_export_stock_parser",
    "counterfactuals": "nnunet_cfcl.nnunet.counterfactual_import:add_counterfactuals_parser",
    "demo": "nnunet_cfcl.demo.command:add_demo_parser",
    "phantom": "nnunet_cfcl.phantom.command:add_phantom_parser",
}


def build_parser(verbs: Iterable[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser with the sub-parsers of ``verbs`` (all of them by default, as ``--help`` needs)."""
    parser = argparse.ArgumentParser(
        prog="nnunet_cfcl", description="Counterfactual contrastive pretraining for nnU-Net v2.",
        epilog="Training itself is nnU-Net's own command: nnUNetv2_train DATASET CONFIG FOLD -tr nnUNetTrainerDVDCL")
    parser.add_argument("--version", action="version", version=f"%(prog)s {nnunet_cfcl.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in verbs:
        module, function = VERBS[verb].split(":")
        getattr(importlib.import_module(module), function)(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 done, 1 an error the user can mend (one line on stderr), 130 interrupted. Wrong usage exits
        with 2, as argparse does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    typed = argv[0] if argv else ""
    needed = () if typed == "--version" else (typed,) if typed in VERBS else tuple(VERBS)
    arguments = build_parser(needed).parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"nnunet_cfcl {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"nnunet_cfcl {arguments.verb}: interrupted", file=sys.stderr)
        return 130
