"""Measure, summarise, compare: what ``nnunet_cfcl evaluate`` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.masks import figure as evaluation_figure
from nnunet_cfcl.evaluation.masks import measure as measuring
from nnunet_cfcl.evaluation.masks import report as evaluation_report
from nnunet_cfcl.evaluation.masks import summary, tables
from nnunet_cfcl.evaluation.masks.report import Evaluation
from nnunet_cfcl.files.atomic import writable_folder


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
    if not (math.isfinite(tolerance) and tolerance >= 0 and seed >= 0):
        raise UserError(f"--tolerance and --seed must be 0 or more, found {tolerance:g} and {seed}", "mend them")
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
        raise UserError(f"-o {out} is a folder of masks, expected another one", "name a folder of its own, such as "
                        f"{out / 'evaluation'}")
    writable_folder(out, "name another with -o")
