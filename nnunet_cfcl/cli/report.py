"""The verb ``nnunet_cfcl report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

FILE = "report.html"
#: Size of a page that is hard to send by mail.
LARGE_MB = 15


def add_report_parser(subparsers: SubParsers) -> None:
    """Add the verb `report`; its function is the parsed argument `run`."""
    parser = subparsers.add_parser(
        "report", help="write one HTML page about a trained fold, or compare several",
        description="Writes settings, curves, the generator's gate, CHRO-maps, metrics by group and probe of a fold, "
        "and the comparison of several folds, as a self-contained HTML file.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLD_FOLDER",
                        help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_F; others are compared with "
                        "the first")
    parser.add_argument("-o", dest="out", type=Path, metavar="FILE.html",
                        help="default: FOLD_FOLDER/cfcl/report/report.html, with several folders ./report.html")
    parser.add_argument("--by", nargs="+", metavar="COLUMN",
                        help="columns of attributes.csv to group by (default: up to three with few values)")
    parser.add_argument("--evaluation", nargs="+", type=Path, default=[], metavar="DIR",
                        help="further results of `nnunet_cfcl evaluate` to show")
    parser.add_argument("--chromap", nargs="+", type=Path, default=[], metavar="DIR",
                        help="folders of CHRO-maps, one per FOLD_FOLDER (default: maps in validation/, or new maps)")
    parser.add_argument("--no-chromap", action="store_true", help="omit CHRO-maps, so that no model is loaded")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"),
                        help="device for new CHRO-maps (default: cuda if available, else cpu)")
    parser.add_argument("-np", dest="processes", type=int, default=2,
                        help="number of processes of the evaluation (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # here because they import nnU-Net and PyTorch, which --help does not need
    import torch

    from nnunet_cfcl.evaluation.report.page import ReportOptions, write_report

    folders: list[Path] = arguments.folders
    out = arguments.out or (folders[0] / "cfcl" / "report" / FILE if len(folders) == 1 else Path(FILE))
    options = ReportOptions(
        None if arguments.by is None else tuple(arguments.by), not arguments.no_chromap, tuple(arguments.chromap),
        tuple(arguments.evaluation), arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        arguments.processes)
    size = write_report(folders, out, options) / 1e6
    large = "; name fewer folders for a smaller page" if size > LARGE_MB else ""
    print(f"Look at {out.resolve()} ({size:.1f} MB{large})")
    return 0
