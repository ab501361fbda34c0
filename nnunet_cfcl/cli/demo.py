"""The verb ``nnunet_cfcl demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_demo_parser(subparsers: SubParsers) -> None:
    """Add the verb `demo`; its function is the parsed argument `run`."""
    parser = subparsers.add_parser(
        "demo",
        help="plan, train, predict and plot the results, on synthetic patients or your own dataset",
        description="Runs nnU-Net's own commands with nnUNetTrainerDVDCL for a few epochs and plots the results. The "
        "training is far too short for good masks: it shows that everything works.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder of all results")
    parser.add_argument("--raw", default=None, metavar="DATASET_FOLDER", help="raw dataset DatasetXXX_Name in "
                        "nnU-Net's format, which is only read; synthetic patients if not given")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"), help="device of nnU-Net")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # here because it imports nnU-Net, which --help does not need
    from nnunet_cfcl.demo.run import run_demo

    picture = run_demo(Path(arguments.out), Path(arguments.raw) if arguments.raw else None, arguments.device)
    print(f"\nLook at {picture}")
    return 0
