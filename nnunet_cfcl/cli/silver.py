"""The verb ``nnunet_cfcl silver``."""

from __future__ import annotations

import argparse
from typing import Any


def add_silver_parser(subparsers: Any) -> None:
    """Add the verb `silver`."""
    parser = subparsers.add_parser(
        "silver", help="label the pool (imagesUn) with a trained model (labelsSilver)",
        description="Predicts every case of imagesUn with a finished model of any trainer, writes labels, "
        "probabilities and silver.csv into labelsSilver, and preprocesses the pool as `nnunet_cfcl pool` does. "
        "Finished labels of the same model are kept: run the command again after an interruption, or with new images. "
        "Labels that it did not make are never replaced.")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
    parser.add_argument("-f", dest="fold", required=True,
                        help="fold of the model, 0 to 4 or all; the labels are for trainings of the same fold")
    parser.add_argument("-tr", dest="trainer", required=True, help="any trainer of nnU-Net, whose trained fold labels")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: %(default)s")
    parser.add_argument("-np", dest="processes", type=int, default=2, help="number of processes (default: %(default)s)")
    parser.set_defaults(run=_run_silver)


def _run_silver(arguments: argparse.Namespace) -> int:
    from nnunet_cfcl.cli.chromap import let_trainers_be_found

    let_trainers_be_found()
    # here because they import nnU-Net, which --help does not need
    import torch

    from nnunet_cfcl.data.pool.labelling import label_pool
    from nnunet_cfcl.doctor.device import check_device
    from nnunet_cfcl.evaluation.probe.models import find_any_trainer
    from nnunet_cfcl.nnunet.fold import FoldContext

    def no_log(*line: Any, **_: Any) -> None:
        """Suppress nnU-Net's report of the split."""

    fold = FoldContext.find(
        find_any_trainer(arguments.trainer), arguments.dataset, arguments.configuration, arguments.fold,
        arguments.plans, torch.device(arguments.device), no_log)
    check_device(arguments.device).raise_on_failure()
    label_pool(fold, arguments.processes)
    return 0
