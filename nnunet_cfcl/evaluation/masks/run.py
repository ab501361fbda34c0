"""Evaluation of folders of masks: measure, summarise, compare, and write the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.masks import figure, report, summary, tables
from nnunet_cfcl.evaluation.masks.measure import measure
from nnunet_cfcl.evaluation.masks.report import Evaluation
from nnunet_cfcl.files.atomic import writable_folder


def evaluate(
    predictions: str, truth: Path, out: Path, attributes: Path | None = None, by: Sequence[str] = (),
    against: Sequence[str] = (), tolerance: float = 2.0, processes: int = 1, seed: int = 0,
    log: Callable[[str], object] = print,
) -> Evaluation:
    """Evaluate masks and write four files, and one table per further method, to a folder.

    Args:
        predictions: predicted masks, as ``FOLDER`` or ``NAME=FOLDER``.
        truth: folder of the true masks.
        out: folder of the results, created where it is missing; not a folder of masks.
        attributes: table with a row per case, or the folder of an attributes.csv.
        by: columns of the table to group by.
        against: masks of other methods to compare with, in the same form as ``predictions``.
        tolerance: tolerance of the normalised surface Dice in mm (PNG: pixels).
        processes: number of worker processes.
        seed: seed of bootstrap and permutations, 0 or more.
        log: receives the messages.

    Raises:
        UserError: tolerance or seed are below 0, ``out`` cannot be written, or `tables` or `measure` reject the input.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0 and seed >= 0):
        raise UserError(f"expected --tolerance and --seed to be 0 or more, found {tolerance:g} and {seed}")
    named = tables.named_folders([predictions, *against])
    true_masks = tables.read_folder(truth, "truth")
    methods = [tables.read_folder(folder, name) for name, folder in named.items()]
    cases = sorted({case for method in methods for case in method.files} & set(true_masks.files))
    example = next(iter(true_masks.files.items()))
    joined = tables.join_attributes(attributes, cases, example[1].name.removeprefix(example[0]))
    groupings = joined.groupings(by, cases)
    scheme = tables.find_labels(truth, methods[0].folder)
    _create_folder(out, [truth, *named.values()])
    measured = measure(true_masks, methods, scheme, tolerance, processes)
    records = summary.summarise(measured, groupings, joined.patient, seed)
    evaluation = Evaluation(truth, measured, records, scheme, joined, tuple(dict.fromkeys(by)), tolerance, seed)
    report.write_tables(out, evaluation)
    figure.draw(out / figure.FIGURE, evaluation, groupings)
    for line in (*report.remarks(evaluation), *report.short_summary(evaluation)):
        log(line)
    log(f"Look at {out / report.PAGE} and {out / figure.FIGURE}")
    return evaluation


def _create_folder(out: Path, inputs: Sequence[Path]) -> None:
    # the next evaluation of a folder of masks would read metrics.png as a mask
    if out.resolve() in {folder.resolve() for folder in inputs}:
        raise UserError(f"-o {out} is a folder of masks, expected a separate folder",
                        f"write -o {out / 'evaluation'}, for example")
    writable_folder(out, "name another folder with -o")
