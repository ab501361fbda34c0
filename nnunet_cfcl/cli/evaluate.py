"""The verb ``nnunet_cfcl evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_evaluate_parser(subparsers: SubParsers) -> None:
    """Add the verb `evaluate`; its function is the parsed argument `run`."""
    parser = subparsers.add_parser(
        "evaluate", help="measure masks against the truth, per label and group, and compare methods",
        description="Computes Dice, HD95, ASSD and normalised surface Dice of two folders of masks, per case, label "
        "and group, with intervals over patients; writes metrics.csv, metrics.json, metrics.md and metrics.png.")
    parser.add_argument("-p", dest="predictions", required=True, metavar="PREDICTIONS",
                        help="folder of predicted masks, or NAME=FOLDER to name the method")
    parser.add_argument("-g", dest="truth", type=Path, required=True, metavar="TRUTH", help="folder of true masks")
    parser.add_argument("--attributes", type=Path, metavar="FILE",
                        help="table with a column case, optionally patient, and columns to group by (attributes.csv)")
    parser.add_argument("--by", nargs="+", default=[], metavar="COLUMN", help="columns of the table to group by")
    parser.add_argument("--against", nargs="+", default=[], metavar="OTHER",
                        help="folders of other methods' masks (or NAME=FOLDER) to compare with, case by case")
    parser.add_argument("-o", dest="out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="MM",
                        help="tolerance of the surface Dice in mm, for PNG in pixels (default: %(default)s)")
    parser.add_argument("-np", dest="processes", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of bootstrap and permutations (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # here because it imports nnU-Net and MONAI, which --help does not need
    from nnunet_cfcl.evaluation.masks.run import evaluate

    evaluate(arguments.predictions, arguments.truth, arguments.out, arguments.attributes, arguments.by,
             arguments.against, arguments.tolerance, arguments.processes, arguments.seed)
    return 0
