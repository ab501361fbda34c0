"""The chapter in which several folds stand side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nnunet_cfcl.evaluation.report import sections
from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Cell,
    Chapter,
    Figure,
    Fold,
    Note,
    Section,
    figure_text,
    table,
    value_text,
)
from nnunet_cfcl.evaluation.report.curves import compared_curves
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder, probe_models, setting_rows
from nnunet_cfcl.evaluation.report.metrics import (
    Metrics,
    difference_blocks,
    mean_dice,
    metrics_blocks,
)
from nnunet_cfcl.files.lenient_json import as_number, as_object

Measurements = Mapping[str, Metrics | str]


def comparison(folds: Mapping[str, FoldFolder], measured: Measurements, most_width: int) -> Chapter:
    """What differs between folds of one dataset.

    Args:
        folds: by name; the first is what the others are compared with.
        measured: of each fold's masks.
        most_width: of pictures, in pixels.
    """
    place = next(iter(folds.values())).place
    return Chapter("comparison", "Comparison", f"{place.dataset}, {place.configuration}: {len(folds)} trainings", (), [
        Section("table", "Side by side", "The main figures of every training.", "",
                [_main_table(folds, measured), *_remarks(folds)]),
        Section("differences", "Metrics", "Masks of the final validation, all trainings on the same cases: Dice and "
                "NSD are best at 1, HD95 and ASSD at 0.", "", _metric_blocks(measured, most_width)),
        Section("compared-curves", "Curves", "Both phases of all trainings in the same panels.", "", _curves(folds)),
        Section("compared-probes", "Probes", "What the frozen features of every training tell.", "", _probes(folds)),
        Section("compared-settings", "Settings that differ", "Settings, and those alone, that are not the same "
                "everywhere.", "Only what you meant to compare differs.", _settings(folds))])


def _main_table(folds: Mapping[str, FoldFolder], measured: Measurements) -> Block:
    rows: list[list[str | Cell]] = []
    for name, fold in folds.items():
        states = [state for _, state, _ in sections.phases(fold)]
        found = measured[name]
        last = as_number(fold.pretraining[-1].get("loss")) if fold.pretraining else math.nan
        pseudo = fold.training.epochs[-1].get("pseudo_dice", math.nan) if fold.training.epochs else math.nan
        dice = mean_dice(found, name) if isinstance(found, Metrics) else math.nan
        rows.append([name, str(fold.config.get("method", "none")), fold.source or "none", states[1], states[2],
                     *(figure_text(value) for value in (last, pseudo, dice))])
    return table("All trainings", ["trainer", "pretraining", "counterfactuals", "phase 1", "phase 2",
                                   "last pretraining loss", "last pseudo Dice", "Dice, mean of the labels"], rows)


def _remarks(folds: Mapping[str, FoldFolder]) -> list[Block]:
    """What makes a comparison unfair."""
    found: list[Block] = []
    for key, word in (("plans", "plans"), ("fold", "folds, and so other validation cases")):
        if len({getattr(fold.place, key) for fold in folds.values()}) > 1:
            found.append(Note(f"Mind: the trainings have different {word}.", "bad"))
    counts = {name: len(fold.training.epochs) for name, fold in folds.items() if fold.training.epochs}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        found.append(Note(f"Mind: nnU-Net's trainings are not equally long, in epochs: {said}.", "bad"))
    return found


def _metric_blocks(measured: Measurements, most_width: int) -> list[Block]:
    blocks: list[Block] = []
    for name, found in measured.items():
        if isinstance(found, str):
            blocks.append(Note(f"{name} was not measured: {found}.", "bad"))
    # those that were measured together share one evaluation
    evaluations = {id(found): found for found in measured.values() if isinstance(found, Metrics)}.values()
    for metrics in evaluations:
        found_blocks = [*difference_blocks(metrics), *metrics_blocks(metrics, metrics.methods, most_width)]
        is_alone = len(metrics.methods) == 1
        blocks += [Fold(metrics.methods[0], found_blocks, is_open=True)] if is_alone else found_blocks
    return blocks


def _curves(folds: Mapping[str, FoldFolder]) -> list[Block]:
    picture = compared_curves(folds)
    return [Note("There are no curves.", "quiet") if picture is None else Figure(picture)]


def _probes(folds: Mapping[str, FoldFolder]) -> list[Block]:
    models = {f"{name}: {model.get('model')}": model
              for name, fold in folds.items() for model in probe_models(fold.probe)}
    if not models:
        return [Note("There are no figures; nnunet_cfcl probe measures them.", "quiet")]
    blocks = sections.probe_tables(models)
    if len({str(as_object(model).get("image_set")) for model in models.values()}) > 1:
        blocks.insert(0, Note("Mind: they were measured on different images (image_set), so that these figures cannot "
                              "be compared.", "bad"))
    return blocks


def _settings(folds: Mapping[str, FoldFolder]) -> list[Block]:
    found = {name: {row.key: row for row in setting_rows(fold)} for name, fold in folds.items()}
    known = {name: rows for name, rows in found.items() if rows}
    blocks: list[Block] = [Note(f"{name} has no recorded settings.", "quiet") for name in folds if name not in known]
    rows: list[Sequence[str]] = []
    for key in dict.fromkeys(key for rows_of in known.values() for key in rows_of):
        values = [value_text(rows_of[key].value) if key in rows_of else "not there" for rows_of in known.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if rows:
        return [*blocks, table("Settings that differ", ["setting", *known], rows)]
    return [*blocks, *([Note("All recorded settings are the same.")] if len(known) > 1 else [])]
