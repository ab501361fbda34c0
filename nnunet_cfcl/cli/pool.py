"""The verb ``nnunet_cfcl pool``."""

from __future__ import annotations

import argparse
from typing import Any


def add_pool_parser(subparsers: Any) -> None:
    """Add the verb `pool`."""
    parser = subparsers.add_parser(
        "pool", help="preprocess unlabelled images (imagesUn) and AI-made labels (labelsSilver)",
        description="Checks all files and lists the invalid ones, then preprocesses with the dataset's own plan. Run "
        "nnUNetv2_plan_and_preprocess first. Unchanged cases are skipped: run the command again after an interruption, "
        "or with new images.")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-np", dest="processes", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.set_defaults(run=_run_pool)


def _run_pool(arguments: argparse.Namespace) -> int:
    # here because it imports nnU-Net, which --help does not need
    from nnunet_cfcl.data.pool.run import preprocess_pool

    preprocess_pool(arguments.dataset, arguments.configuration, arguments.plans, arguments.processes)
    return 0
