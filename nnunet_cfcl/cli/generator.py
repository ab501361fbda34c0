"""The verb ``nnunet_cfcl generator``: phase 0 of the trainers, by hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

#: The trainer whose settings and cases phase 0 takes by default: all with counterfactuals share its generator.
TRAINER = "nnUNetTrainerDVDCL"


def add_generator_parser(subparsers: Any) -> None:
    """Adds the verb ``generator``."""
    parser = subparsers.add_parser(
        "generator", help="train, judge and use a generator of counterfactuals",
        description="What the trainers do by themselves as phase 0 where the dataset has an attributes.csv: the same "
        "files are found again by nnUNetv2_train. Each of the three does what comes before it, if it is not done.")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, run, words in (
            ("train", _train, "train the generator, or go on where it was stopped"),
            ("report", _report, "judge every intervention on held-out patients: numbers and pictures"),
            ("generate", _generate, "make the counterfactuals of all cases, by the interventions that passed")):
        verb = verbs.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        verb.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
        verb.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
        verb.add_argument("-f", dest="fold", required=True, help="fold, 0 to 4 or all")
        verb.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
        verb.add_argument("-tr", dest="trainer", default=TRAINER, help="trainer (default: %(default)s)")
        verb.add_argument("-device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
        verb.set_defaults(run=_with_phase_0(run))


def _with_phase_0(run: Callable[[Any], None]) -> Callable[[argparse.Namespace], int]:
    def command(arguments: argparse.Namespace) -> int:
        # nnU-Net and torch are imported for the commands that need them only
        from nnunet_cfcl.cli.pretrain import own_device
        from nnunet_cfcl.nnunet.fold import FoldContext
        from nnunet_cfcl.phases.generator_phase import GeneratorPhase
        from nnunet_cfcl.runs.ranks import Ranks
        from nnunet_cfcl.trainers.lookup import find_trainer

        fold = FoldContext.find(
            find_trainer(arguments.trainer), arguments.dataset, arguments.configuration, arguments.fold,
            arguments.plans, own_device(arguments.device), _say)
        run(GeneratorPhase(fold, Ranks()))
        return 0

    return command


def _train(phase: Any) -> None:
    phase.trained()
    _say(f"Done: {phase.task.folder}. Next: nnunet_cfcl generator report, with the same arguments")


def _report(phase: Any) -> None:
    phase.judged()
    _say(f"The report is in {phase.report_folder}: begin with report.md and contact_sheet.png")


def _generate(phase: Any) -> None:
    judged = phase.judged()
    if judged.passed:
        _say(f"The counterfactuals are in {phase.generated(judged).folder}")
    else:
        _say("Nothing is generated, no intervention passed the gate: trainings will use acquisition instead. See "
             f"{phase.report_folder}")


def _say(*line: Any, **ignored: Any) -> None:
    print(*line, flush=True)
