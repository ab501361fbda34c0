"""The verb ``nnunet_cfcl generator``: the generator phase (phase 0) of the trainers as separate commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

#: Default trainer for settings and cases: all trainers with counterfactuals share its generator.
TRAINER = "nnUNetTrainerDVDCL"


def add_generator_parser(subparsers: Any) -> None:
    """Add the verb ``generator``."""
    parser = subparsers.add_parser(
        "generator", help="train, evaluate and use a generator of counterfactuals",
        description="Phase 0 of the trainers, which run it automatically if the dataset has an attributes.csv; "
        "nnUNetv2_train reuses the files. Each command first runs the previous ones if needed.")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, run, summary in (
            ("train", _train, "train the generator, or resume a stopped training"),
            ("report", _report, "evaluate every intervention on held-out patients: metrics and figures"),
            ("generate", _generate, "generate the counterfactuals of all cases for the interventions that passed")):
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        verb.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
        verb.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
        verb.add_argument("-f", dest="fold", required=True, help="fold, 0 to 4 or all")
        verb.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
        verb.add_argument("-tr", dest="trainer", default=TRAINER, help="trainer (default: %(default)s)")
        verb.add_argument("-device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
        verb.set_defaults(run=_with_phase_0(run))


def _with_phase_0(run: Callable[[Any], None]) -> Callable[[argparse.Namespace], int]:
    def command(arguments: argparse.Namespace) -> int:
        # nnU-Net and torch are imported here, so that other commands start without them
        from nnunet_cfcl.cli.pretrain import own_device
        from nnunet_cfcl.nnunet.fold import FoldContext
        from nnunet_cfcl.phases.generator_phase import GeneratorPhase
        from nnunet_cfcl.runs.ranks import Ranks
        from nnunet_cfcl.trainers.lookup import find_trainer

        fold = FoldContext.find(
            find_trainer(arguments.trainer), arguments.dataset, arguments.configuration, arguments.fold,
            arguments.plans, own_device(arguments.device), _print)
        run(GeneratorPhase(fold, Ranks()))
        return 0

    return command


def _train(phase: Any) -> None:
    phase.trained()
    _print(f"Generator trained: {phase.task.folder}. Next: nnunet_cfcl generator report with the same arguments")


def _report(phase: Any) -> None:
    phase.judged()
    _print(f"Report written to {phase.report_folder}: start with report.md and contact_sheet.png")


def _generate(phase: Any) -> None:
    judged = phase.judged()
    if judged.passed:
        _print(f"The counterfactuals are in {phase.generated(judged).folder}")
    else:
        _print("No counterfactuals generated: no intervention passed the gate, trainings will use acquisition instead. "
               f"See {phase.report_folder}")


def _print(*line: Any, **ignored: Any) -> None:
    print(*line, flush=True)
