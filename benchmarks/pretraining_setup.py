"""Common setup of the benchmarks of the pretraining step: a real trainer, its pretraining, one batch of each phase."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnunet_cfcl.nnunet.decoder_tap import tapped
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.pretraining.loop import Pretraining
from nnunet_cfcl.runs.ranks import Ranks


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a planned and preprocessed dataset in nnU-Net's folders, and of the results."""
    parser.add_argument("-d", required=True, help="dataset id or name, planned and preprocessed")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans")
    parser.add_argument("-tr", default="nnUNetTrainerDVDCL", help="trainer")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder of the results")


def make_trainer(arguments: argparse.Namespace) -> Any:
    """Create an initialised trainer with nnU-Net's own look-up."""
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    trainer = get_trainer_from_args(arguments.d, arguments.c, 0, arguments.tr, arguments.p, device=device)
    trainer.initialize()
    return trainer


@dataclass(frozen=True)
class Prepared:
    """A pretraining and one batch for it."""

    pretraining: Pretraining
    batch: Any


@contextmanager
def prepared_pretraining(
    trainer: Any, images: int | None = None, patches_per_pass: int | None = None
) -> Iterator[Prepared]:
    """Provide the trainer's pretraining, ready to step, and restore the network afterwards."""
    fold = FoldContext.of(trainer)
    objective = build_objective(fold, trainer.method)
    task = build_task(fold, trainer.method, objective, Ranks())
    if images is not None:
        pretrain = replace(task.settings.pretrain, images_per_step=images)
        task = replace(task, settings=replace(task.settings, pretrain=pretrain))
    task = replace(task, workers=0, patches_per_pass=patches_per_pass or task.patches_per_pass)
    with tapped(trainer.network, objective.tap) as part:
        pretraining = Pretraining(part.network, part.features, part.width, task)
        pretraining.model.train()
        yield Prepared(pretraining, next(pretraining.batches(0)))


def write_result(out: Path, name: str, result: dict[str, Any]) -> None:
    """``out/name.json``, also printed."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (out / f"{name}.json").write_text(text + "\n")
    print(text)
