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
        help="nnU-Net alone beside the plugin on two scanners, on synthetic patients or your own dataset",
        description="Trains nnU-Net alone and with the plugin, with nnU-Net's own commands and as many optimiser "
        "steps, tests both and draws a picture of the results. Synthetic patients have labels on scanner A alone, and "
        "true counterfactuals on scanner B; a few minutes suffice for good masks of both. For an own dataset the "
        "training is far too short for that: it shows that everything works.",
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
