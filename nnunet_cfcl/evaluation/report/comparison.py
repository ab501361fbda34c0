"""Chapter of the report that compares several folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nnunet_cfcl.evaluation.report import sections
from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Cell,
    Chapter,
    Details,
    Figure,
    Note,
    Section,
    metric_text,
    setting_text,
    table,
)
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder, probe_models, setting_rows
from nnunet_cfcl.evaluation.report.metrics import (
    Metrics,
    difference_blocks,
    mean_dice,
    metrics_blocks,
)
from nnunet_cfcl.evaluation.report.plots import compared_curves
from nnunet_cfcl.evaluation.report.states import phases
from nnunet_cfcl.files.lenient_json import as_number, as_object

Measurements = Mapping[str, Metrics | str]


def comparison(folds: Mapping[str, FoldFolder], measured: Measurements, most_width: int) -> Chapter:
    """Compare folds of one dataset.

    Args:
        folds: name -> fold; the others are compared with the first.
        measured: name -> metrics of the fold's masks, or the reason why there are none.
        most_width: largest width of pictures in pixels.
    """
    place = next(iter(folds.values())).place
    return Chapter("comparison", "Comparison", f"{place.dataset}, {place.configuration}: {len(folds)} trainings", (), [
        Section("table", "Side by side", "The main results of every training.", "",
                [_main_table(folds, measured), *_remarks(folds)]),
        Section("differences", "Metrics", "Masks of the final validation, all trainings on the same cases. A perfect "
                "Dice and NSD is 1, a perfect HD95 and ASSD is 0.", "", _metric_blocks(measured, most_width)),
        Section("compared-curves", "Curves", "Pretraining and fine-tuning of all trainings in the same panels.", "",
                _curves(folds)),
        Section("compared-probes", "Probes", "Metrics of the frozen features of every training.", "", _probes(folds)),
        Section("compared-settings", "Settings that differ", "Settings whose values differ between the trainings.",
                "Only the intended settings differ.", _settings(folds))])


def _main_table(folds: Mapping[str, FoldFolder], measured: Measurements) -> Block:
    rows: list[list[str | Cell]] = []
    for name, fold in folds.items():
        states = [state for _, state, _ in phases(fold)]
        found = measured[name]
        last = as_number(fold.pretraining[-1].get("loss")) if fold.pretraining else math.nan
        pseudo = fold.training.epochs[-1].get("pseudo_dice", math.nan) if fold.training.epochs else math.nan
        dice = mean_dice(found, name) if isinstance(found, Metrics) else math.nan
        rows.append([name, str(fold.config.get("method", "none")), fold.source or "none", states[1], states[2],
                     *(metric_text(value) for value in (last, pseudo, dice))])
    return table("All trainings", ["trainer", "pretraining", "counterfactuals", "phase 1", "phase 2",
                                   "last pretraining loss", "last pseudo Dice", "Dice, mean of the labels"], rows)


def _remarks(folds: Mapping[str, FoldFolder]) -> list[Block]:
    """List the differences that make a comparison unfair."""
    found: list[Block] = []
    for key, word in (("plans", "plans"), ("fold", "folds, and therefore different validation cases")):
        if len({getattr(fold.place, key) for fold in folds.values()}) > 1:
            found.append(Note(f"Caution: the trainings have different {word}.", "bad"))
    counts = {name: len(fold.training.epochs) for name, fold in folds.items() if fold.training.epochs}
    if len(set(counts.values())) > 1:
        epochs = ", ".join(f"{name} {count}" for name, count in counts.items())
        found.append(Note(f"Caution: the fine-tunings differ in their number of epochs: {epochs}.", "bad"))
    return found


def _metric_blocks(measured: Measurements, most_width: int) -> list[Block]:
    blocks: list[Block] = []
    for name, found in measured.items():
        if isinstance(found, str):
            blocks.append(Note(f"{name} was not measured: {found}.", "bad"))
    # folds that were measured together share one evaluation
    evaluations = {id(found): found for found in measured.values() if isinstance(found, Metrics)}.values()
    for metrics in evaluations:
        found_blocks = [*difference_blocks(metrics), *metrics_blocks(metrics, metrics.methods, most_width)]
        is_alone = len(metrics.methods) == 1
        blocks += [Details(metrics.methods[0], found_blocks, is_open=True)] if is_alone else found_blocks
    return blocks


def _curves(folds: Mapping[str, FoldFolder]) -> list[Block]:
    picture = compared_curves(folds)
    return [Note("There are no curves.", "quiet") if picture is None else Figure(picture)]


def _probes(folds: Mapping[str, FoldFolder]) -> list[Block]:
    models = {f"{name}: {model.get('model')}": model
              for name, fold in folds.items() for model in probe_models(fold.probe)}
    if not models:
        return [Note("There are no results; nnunet_cfcl probe computes them.", "quiet")]
    blocks = sections.probe_tables(models)
    if len({str(as_object(model).get("image_set")) for model in models.values()}) > 1:
        blocks.insert(0, Note("Caution: the models were measured on different images (image_set): their metrics are "
                              "not comparable.", "bad"))
    return blocks


def _settings(folds: Mapping[str, FoldFolder]) -> list[Block]:
    found = {name: {row.key: row for row in setting_rows(fold)} for name, fold in folds.items()}
    known = {name: rows for name, rows in found.items() if rows}
    blocks: list[Block] = [Note(f"{name} has no recorded settings.", "quiet") for name in folds if name not in known]
    rows: list[Sequence[str]] = []
    for key in dict.fromkeys(key for rows_of in known.values() for key in rows_of):
        values = [setting_text(rows_of[key].value) if key in rows_of else "not set" for rows_of in known.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if rows:
        return [*blocks, table("Settings that differ", ["setting", *known], rows)]
    return [*blocks, *([Note("All recorded settings are the same.")] if len(known) > 1 else [])]
