"""The verb `nnunet_cfcl phantom`: write a phantom dataset and a picture of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

SHEET_ROWS = 6


def add_phantom_parser(subparsers: SubParsers) -> None:
    """Register the verb `phantom`."""
    parser = subparsers.add_parser(
        "phantom",
        help="write a dataset of synthetic patients with true counterfactuals",
        description="Write an nnU-Net raw dataset of synthetic patients from a known causal model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="RAW_FOLDER", help="nnU-Net's raw folder")
    parser.add_argument("--dataset-id", type=int, default=900, metavar="ID", help="number of the dataset")
    parser.add_argument("--name", default=None, help="name of the dataset (Phantom2D or Phantom3D if not given)")
    parser.add_argument("--dim", type=int, choices=(2, 3), default=2, help="dimensions of the images")
    parser.add_argument("--shape", type=int, nargs="+", default=None, metavar="N", help="image size, [z] y x")
    parser.add_argument("--patients", type=int, default=40, metavar="N", help="training patients")
    parser.add_argument("--test-patients", type=int, default=20, metavar="N", help="test patients, from both scanners")
    parser.add_argument("--seed", type=int, default=0, help="patient i depends on (seed, i) alone")
    parser.add_argument(
        "--train-scanners", nargs="+", choices=("A", "B"), default=["A"], help="scanners of the training patients"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a phantom dataset of this number and name")
    parser.set_defaults(run=run_phantom)


def run_phantom(arguments: argparse.Namespace) -> int:
    """Write the dataset and `contact_sheet.png` in its folder.

    Returns:
        0.

    Raises:
        UserError: See `write_phantom_dataset`.
    """
    from nnunet_cfcl.phantom.dataset import phantom_cases, write_phantom_dataset
    from nnunet_cfcl.phantom.sheet import contact_sheet

    folder = write_phantom_dataset(
        arguments.out,
        arguments.dataset_id,
        arguments.name or f"Phantom{arguments.dim}D",
        arguments.dim,
        arguments.patients,
        arguments.test_patients,
        arguments.seed,
        shape=arguments.shape,
        train_scanners=tuple(arguments.train_scanners),
        overwrite=arguments.overwrite,
    )
    rows = min(SHEET_ROWS, arguments.patients)
    cases = phantom_cases(rows, arguments.seed, arguments.dim, arguments.shape, scanners=arguments.train_scanners)
    sheet = contact_sheet(folder / "contact_sheet.png", cases)
    print(f"Wrote {arguments.patients} training and {arguments.test_patients} test patients to {folder}.")
    print(f"Look at {sheet}.")
    return 0
