"""The verb ``nnunet_cfcl pool``."""

from __future__ import annotations

import argparse
from typing import Any

from nnunet_cfcl.data.pool.run import preprocess_pool


def add_pool_parser(subparsers: Any) -> None:
    """Adds the verb ``pool``."""
    parser = subparsers.add_parser(
        "pool", help="preprocess unlabelled images (imagesUn) and AI-made labels (labelsSilver)",
        description="Checks all files first and names every bad one, then preprocesses with the dataset's own plan. "
        "Run nnUNetv2_plan_and_preprocess first. What is done and unchanged is skipped: after an interruption, or with "
        "new images, run it again.")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-np", dest="processes", type=int, default=2, help="processes (default: %(default)s)")
    parser.set_defaults(run=_run_pool)


def _run_pool(arguments: argparse.Namespace) -> int:
    preprocess_pool(arguments.dataset, arguments.configuration, arguments.plans, arguments.processes)
    return 0
