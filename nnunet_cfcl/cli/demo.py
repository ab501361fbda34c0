"""The verb `nnunet_cfcl demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_demo_parser(subparsers: SubParsers) -> None:
    """Register the verb `demo`; parsed arguments carry its function as `run`."""
    parser = subparsers.add_parser(
        "demo",
        help="plan, train, predict and draw a picture, on synthetic patients or on a dataset of yours",
        description="Runs nnU-Net's own commands with nnUNetTrainerDVDCL, briefly, and leaves a picture to look at. "
        "The training is far too short for good masks: it shows that everything works.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="everything is written here")
    parser.add_argument("--raw", default=None, metavar="DATASET_FOLDER", help="a raw dataset DatasetXXX_Name in "
                        "nnU-Net's format (it is only read); synthetic patients if not given")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"), help="as nnU-Net's")
    parser.set_defaults(run=run_demo_command)


def run_demo_command(arguments: argparse.Namespace) -> int:
    """Run the demo and say where its picture is; returns 0."""
    from nnunet_cfcl.demo.run import run_demo

    picture = run_demo(Path(arguments.out), Path(arguments.raw) if arguments.raw else None, arguments.device)
    print(f"\nLook at {picture}")
    return 0
