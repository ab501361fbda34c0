"""The verb ``nnunet_cfcl probe``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_probe_parser(subparsers: SubParsers) -> None:
    """Add the verb `probe`; its function is the parsed argument `run`."""
    parser = subparsers.add_parser(
        "probe", help="measure frozen features: linear probe, clusters, invariance",
        description="Measures the last decoder map: linear probe Dice, k-means accuracy, distance between classes and "
        "invariance to counterfactuals and scanners, on a fold's validation cases, with the same voxels for every "
        "model; writes probe.json, probe.md and probe.png. Only the linear probe is trained.")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-f", dest="fold", required=True, help="fold with validation cases, 0 to 4")
    parser.add_argument("-tr", dest="trainer", help="any trainer of nnU-Net, whose trained fold is probed")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth",
                        help="checkpoint in the fold's folder (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE",
                        help="checkpoints with network_weights (nnU-Net's, a pretraining's), or NAME=FILE")
    parser.add_argument("--untrained", action="store_true", help="also probe the initial weights of a training")
    parser.add_argument("-o", dest="out", type=Path, metavar="DIR",
                        help="folder to write to (default with -tr: fold_F/cfcl/probe)")
    parser.add_argument("--cases", type=int, default=32, metavar="N",
                        help="most training cases, and most validation cases (default: %(default)s)")
    parser.add_argument("--by", default="scanner", metavar="COLUMN",
                        help="column of attributes.csv whose groups are compared (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)")
    parser.add_argument("-step_size", type=float, default=0.5,
                        help="step of the sliding window relative to the patch (default: %(default)s)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # here because they import nnU-Net, which --help does not need
    from nnunet_cfcl.doctor.device import check_device
    from nnunet_cfcl.evaluation.probe.run import ProbeRequest, run_probe

    values = {name: getattr(arguments, name) for name in ProbeRequest.__dataclass_fields__}
    request = ProbeRequest(**{**values, "weights": tuple(arguments.weights)})
    check_device(request.device).raise_on_failure()
    run_probe(request)
    return 0
