"""The verb ``nnunet_cfcl report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

FILE = "report.html"
#: A page larger than this is hard to send.
LARGE_MB = 15


def add_report_parser(subparsers: SubParsers) -> None:
    """Register the verb `report`; parsed arguments carry its function as `run`."""
    parser = subparsers.add_parser(
        "report", help="write one HTML page about a trained fold, or compare several",
        description="Settings, curves, the generator's gate, CHRO-maps, metrics by group and the probe of a fold, and "
        "with several folders their comparison, as one HTML file that needs no network and no other file.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLD_FOLDER",
                        help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_F; others are compared with "
                        "the first")
    parser.add_argument("-o", dest="out", type=Path, metavar="FILE.html",
                        help="default: FOLD_FOLDER/cfcl/report/report.html, with several folders ./report.html")
    parser.add_argument("--by", nargs="+", metavar="COLUMN",
                        help="columns of attributes.csv to group by (default: up to three with few values)")
    parser.add_argument("--evaluation", nargs="+", type=Path, default=[], metavar="DIR",
                        help="folders that `nnunet_cfcl evaluate` wrote, shown as well")
    parser.add_argument("--chromap", nargs="+", type=Path, default=[], metavar="DIR",
                        help="folders of CHRO-maps, one per FOLD_FOLDER (default: those in validation/, or new ones)")
    parser.add_argument("--no-chromap", action="store_true", help="no CHRO-maps, and no model is loaded")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"),
                        help="for new CHRO-maps (default: cuda where there is one, else cpu)")
    parser.add_argument("-np", dest="processes", type=int, default=2,
                        help="cases that are measured at the same time (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # here because they import nnU-Net and PyTorch, for which --help should not wait
    import torch

    from nnunet_cfcl.evaluation.report.page import ReportOptions, write_report

    folders: list[Path] = arguments.folders
    out = arguments.out or (folders[0] / "cfcl" / "report" / FILE if len(folders) == 1 else Path(FILE))
    options = ReportOptions(
        None if arguments.by is None else tuple(arguments.by), not arguments.no_chromap, tuple(arguments.chromap),
        tuple(arguments.evaluation), arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        arguments.processes)
    size = write_report(folders, out, options) / 1e6
    large = "; scaled-down pictures in it are still many: name fewer folders" if size > LARGE_MB else ""
    print(f"Look at {out.resolve()} ({size:.1f} MB{large})")
    return 0
