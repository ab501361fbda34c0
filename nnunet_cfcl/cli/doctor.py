"""The verb ``nnunet_cfcl doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from nnunet_cfcl.doctor.run import Training, examine
from nnunet_cfcl.errors import UserError


def add_doctor_parser(subparsers: Any) -> None:
    """Add the verb `doctor`."""
    parser = subparsers.add_parser(
        "doctor", help="check installation, plan, data and device",
        description="Checks the requirements of a training and prints one line per check, with the fix where a check "
                    "fails. Exit status 0: no check failed, 1: at least one failed.")
    parser.add_argument("-d", metavar="DATASET", help="dataset name or number (default: check only the installation)")
    parser.add_argument("-c", metavar="CONFIGURATION", help="2d, 3d_fullres, 3d_lowres, ...")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: %(default)s)")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerDVDCL", help="trainer (default: %(default)s)")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu", "mps"],
                        help="default: %(default)s, as in nnU-Net")
    parser.add_argument("--data", action="store_true", help="scan every preprocessed case for NaN and constant images")
    parser.set_defaults(run=_run_doctor)


def _run_doctor(arguments: argparse.Namespace) -> int:
    if arguments.data and not (arguments.d and arguments.c):
        raise UserError("--data scans the cases of one configuration, expected a dataset and a configuration",
                        "add -d and -c")
    training = Training(arguments.d, arguments.c, arguments.p, arguments.tr, arguments.device)
    failed = 0
    for result in examine(training, arguments.data):
        print(result.line(), flush=True)
        failed += result.status == "FAIL"
    print(f"{failed} checks failed" if failed else "nothing failed")
    return 1 if failed else 0
