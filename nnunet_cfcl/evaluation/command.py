"""The verb ``nnunet_cfcl evaluate``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_cfcl.atomic import writable_folder
from nnunet_cfcl.errors import UserError

if TYPE_CHECKING:
    from nnunet_cfcl.evaluation.evaluation_report import Evaluation

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_evaluate_parser(subparsers: SubParsers) -> None:
    """Register the verb `evaluate`; parsed arguments carry its function as `run`."""
    parser = subparsers.add_parser(
        "evaluate", help="measure masks against the truth, per label and group, and compare methods",
        description="Dice, HD95, ASSD and normalised surface Dice of two folders of masks, per case, label and group, "
        "with intervals over patients; writes metrics.csv, metrics.json, metrics.md and metrics.png.")
    parser.add_argument("-p", dest="predictions", required=True, metavar="PREDICTIONS",
                        help="folder of predicted masks, or NAME=FOLDER to give the method a name")
    parser.add_argument("-g", dest="truth", type=Path, required=True, metavar="TRUTH", help="folder of true masks")
    parser.add_argument("--attributes", type=Path, metavar="FILE",
                        help="table with a column case, optionally patient, and others to group by (attributes.csv)")
    parser.add_argument("--by", nargs="+", default=[], metavar="COLUMN", help="columns of the table to group by")
    parser.add_argument("--against", nargs="+", default=[], metavar="OTHER",
                        help="folders of other methods' masks (or NAME=FOLDER) to compare with, case by case")
    parser.add_argument("-o", dest="out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="MM",
                        help="tolerance of the surface Dice in mm, for PNG in pixels (default: %(default)s)")
    parser.add_argument("-np", dest="processes", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and permutations (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    evaluate(arguments.predictions, arguments.truth, arguments.out, arguments.attributes, arguments.by,
             arguments.against, arguments.tolerance, arguments.processes, arguments.seed)
    return 0


def evaluate(
    predictions: str, truth: Path, out: Path, attributes: Path | None = None, by: Sequence[str] = (),
    against: Sequence[str] = (), tolerance: float = 2.0, processes: int = 1, seed: int = 0,
    say: Callable[[str], object] = print,
) -> Evaluation:
    """Measure, summarise, compare, and write the four files (and one table per other method) to a folder.

    Args:
        predictions, against: ``FOLDER`` or ``NAME=FOLDER``.
        truth: folder of true masks.
        out: made where it is missing; none of the folders of masks.
        attributes: table of the cases, or its folder.
        by: its columns to group by.
        tolerance: of the normalised surface Dice, in mm (PNG: pixels).
        processes: cases at the same time.
        seed: of bootstrap and permutations, 0 or more.
        say: gets the messages.

    Raises:
        UserError: see `tables`, `measure`; a tolerance or seed below 0; ``out`` cannot be written to.
    """
    # here because they import nnU-Net and MONAI, for which --help should not wait
    from nnunet_cfcl.evaluation import evaluate as measuring
    from nnunet_cfcl.evaluation import evaluation_figure, evaluation_report, summary, tables

    if not (math.isfinite(tolerance) and tolerance >= 0 and seed >= 0):
        raise UserError(f"--tolerance and --seed must be 0 or more, found {tolerance:g} and {seed}; mend them")
    named = tables.named_folders([predictions, *against])
    true_masks = tables.read_folder(truth, "truth")
    methods = [tables.read_folder(folder, name) for name, folder in named.items()]
    cases = sorted({case for method in methods for case in method.files} & set(true_masks.files))
    example = next(iter(true_masks.files.items()))
    joined = tables.join_attributes(attributes, cases, example[1].name.removeprefix(example[0]))
    groupings = joined.groupings(by, cases)
    scheme = tables.find_labels(truth, methods[0].folder)
    _make_folder(out, [truth, *named.values()])
    measured = measuring.measure(true_masks, methods, scheme, tolerance, processes)
    findings = summary.summarise(measured, groupings, joined.patient, seed)
    evaluation = evaluation_report.Evaluation(truth, measured, findings, scheme, joined, tuple(dict.fromkeys(by)),
                                              tolerance, seed)
    evaluation_report.write_tables(out, evaluation)
    evaluation_figure.draw(out / evaluation_figure.FIGURE, evaluation, groupings)
    for line in (*evaluation_report.remarks(evaluation), *evaluation_report.short_summary(evaluation)):
        say(line)
    say(f"Look at {out / evaluation_report.PAGE} and {out / evaluation_figure.FIGURE}")
    return evaluation


def _make_folder(out: Path, inputs: Sequence[Path]) -> None:
    # a metrics.png there would be taken for a mask by whoever reads the folder next
    if out.resolve() in {folder.resolve() for folder in inputs}:
        raise UserError(f"-o {out} is a folder of masks, expected another one; name a folder of its own, such as "
                        f"{out / 'evaluation'}")
    writable_folder(out, "name another with -o")
