"""The verb `nnunet_cfcl trainers`: a table of the trainers, built from their classes."""

from __future__ import annotations

from typing import Any

from nnunet_cfcl import trainers
from nnunet_cfcl.trainers.lookup import plugin_trainers

HEADER = ("trainer", "pretraining", "pulled together", "pretrained part", "counterfactuals", "labels", "phase 3",
          "source")
PARTS = {"decoder": "encoder and decoder", "encoder": "encoder", "segmentation": "whole network"}


def trainer_table() -> str:
    """Build the Markdown table with one row per trainer that ``-tr`` accepts."""
    rows = [_row(name) for name in plugin_trainers()]
    return "\n".join([_line(HEADER), _line(["---"] * len(HEADER)), *map(_line, rows)])


def _row(name: str) -> list[str]:
    trainer: Any = getattr(trainers, name)
    method, teacher = getattr(trainer, "method", None), "teacher" if trainer.teaches else ""
    if method is None:
        return [f"`{name}`", "none", "", "", "in phase 3" if teacher else "no", "no", teacher, ""]
    return [
        f"`{name}`", method.name, method.contrasts, PARTS[method.tap], _yes(method.counterfactuals),
        "silver" if method.needs_labels else "no", teacher, method.source,
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def add_trainers_parser(subparsers: Any) -> None:
    """Register the verb `trainers`, which prints the table."""
    parser = subparsers.add_parser("trainers", help="print every trainer and what its pretraining uses")
    parser.set_defaults(run=_print_table)


def _print_table(arguments: Any) -> int:
    print(trainer_table())
    return 0
