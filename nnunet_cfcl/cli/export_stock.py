"""The verb ``nnunet_cfcl export-stock``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_export_stock_parser(subparsers: SubParsers) -> None:
    """Add the verb `export-stock`; its function is the parsed argument `run`."""
    parser = subparsers.add_parser(
        "export-stock", help="write a trained fold as a stock nnU-Net model",
        description="Writes a model folder whose checkpoint names nnUNetTrainer, so that prediction needs no plugin. "
        "It contains only what prediction needs: a training cannot be continued from it with --c. Repeat the command "
        "with other folds and the same OUT for an ensemble.")
    parser.add_argument("fold_folder", type=Path, metavar="FOLD_FOLDER",
                        help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X")
    parser.add_argument("out", type=Path, metavar="OUT", help="model folder to write")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # here because it imports nnU-Net, which --help does not need
    from nnunet_cfcl.trainers.export_stock import export_stock

    for file in export_stock(arguments.fold_folder, arguments.out):
        print(f"wrote {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    print(f"predict with: nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {arguments.out} "
          f"-f {arguments.fold_folder.resolve().name.removeprefix('fold_')}")
    return 0
