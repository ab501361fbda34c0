"""Sections about one fold that are read from its folder: overview, settings, curves, gate, probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Cell,
    Definitions,
    Details,
    Figure,
    Note,
    Section,
    Table,
    interval_of,
    metric_text,
    pictures,
    setting_text,
    table,
)
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder, nnunet_dice, probe_models, setting_rows
from nnunet_cfcl.evaluation.report.plots import pretraining_curves, training_curves
from nnunet_cfcl.evaluation.report.states import SOURCES, phases, verdicts
from nnunet_cfcl.files.lenient_json import as_list, as_number, as_object
from nnunet_cfcl.pretraining.monitor import collapse_warning

GATE_WORDS = (
    ("effectiveness", "share of the counterfactuals that an independent classifier assigns to the target value; in "
     "brackets its accuracy on real images"),
    ("kept", "the same for the attributes that should not change"),
    ("reversibility", "remaining difference after the intervention and its inverse, relative to the change; 0 is "
     "perfect"),
    ("anatomy", "Dice of a small segmentation network on the counterfactual, relative to the original (1: the same); "
     "without labels the agreement of the edges of the two images"),
    ("distance", "distance of the intensities from those of real images of the target group, relative to that of the "
     "originals; 0 is perfect, 1 is no improvement"),
)


def overview(fold: FoldFolder) -> Section:
    """Identity of the training and state of its phases."""
    place, config = fold.place, fold.config
    facts = [
        ("dataset", place.dataset), ("configuration", place.configuration), ("plans", place.plans),
        ("trainer", place.trainer), ("fold", place.fold), ("folder", place.short),
        ("pretraining method", str(config.get("method", "none recorded"))),
        ("counterfactuals", fold.source or "none recorded"), ("settings hash", _hash(fold)),
        ("pretraining hash", str(config.get("pretraining_hash", "none recorded"))),
        ("PyTorch, device", ", ".join(filter(None, (fold.training.torch, fold.training.device))) or "none recorded"),
    ]
    blocks: list[Block] = [Note(f"{line}.", "bad") for line in fold.problems]
    blocks.append(table("Progress", ["phase", "state", "details"], phases(fold)))
    blocks.append(table("Training", ["property", "value"], facts))
    return Section("overview", "Overview", "Dataset, trainer and progress of the training.",
                   "All phases are finished.", blocks)


def _hash(fold: FoldFolder) -> str | Cell:
    found = str(fold.config.get("settings_hash", "none recorded"))
    if fold.hash_is_right is False:
        return Cell(f"{found}, which does not match the settings in this file: it was changed by hand", "bad")
    return found


def settings(fold: FoldFolder) -> Section:
    """Settings that differ from the defaults, and all settings."""
    rows = setting_rows(fold)
    blocks: list[Block] = []
    if not rows:
        blocks.append(Note("There is no cfcl/config.json, which trainers of this plugin write first.", "quiet"))
    else:
        changed = [row for row in rows if row.differs]
        heads = ("setting", "value", "default", "meaning")
        cells = {row.key: [row.key, setting_text(row.value), setting_text(row.default) if row.known else "",
                           row.meaning] for row in rows}
        caption = f"{len(changed)} of {len(rows)} settings differ from the defaults"
        blocks.append(table(caption, heads, [cells[row.key] for row in changed]) if changed else
                      Note("All settings have their default values."))
        blocks.append(Details(f"All {len(rows)} settings", [table("All settings", heads, list(cells.values()))]))
    return Section("settings", "Settings", "Settings that differ from the defaults.",
                   "Every difference is intended.", blocks)


def curves(fold: FoldFolder, most_width: int) -> Section:
    """Learning curves of both phases, and example views."""
    blocks = _figure(pretraining_curves(fold), "There are no curves of a pretraining.")
    if warning := _collapse(fold):
        blocks.append(Note(warning, "bad"))
    blocks += _figure(training_curves(fold), "There are no epochs in nnU-Net's training logs.")
    views = pictures(fold.pretraining_folder, [(
        "views.png", "Views of the first images of the pretraining, with corresponding points in the same colours",
        "Views of the first images. Every counterfactual should show the same patient, and points of one colour must "
        "lie at the same anatomical location.")], most_width)
    blocks += views or [Note("There is no picture of the views (pretraining/views.png).", "quiet")]
    return Section("curves", "Curves and views", "Metrics of both phases by epoch, and the views of the pretraining.",
                   "Pretraining: the loss falls well below chance (dashed), alignment falls after the warm-up, "
                   "uniformity stays well below 0, the gradient norm stabilises. nnU-Net's training: both losses "
                   "fall, and the pseudo Dice rises to a plateau.", blocks)


def _figure(picture: Any, otherwise: str) -> list[Block]:
    return [Note(otherwise, "quiet") if picture is None else Figure(picture)]


def _collapse(fold: FoldFolder) -> str | None:
    """Warning of the pretraining's monitor about its last epoch."""
    if not fold.pretraining:
        return None
    known = {key: number for key, value in fold.pretraining[-1].items() if math.isfinite(number := as_number(value))}
    return collapse_warning(known) if "loss" in known else None


def gate(fold: FoldFolder, most_width: int) -> Section:
    """Verdicts and plots of the generator's gate."""
    blocks: list[Block] = []
    if fold.gate:
        blocks += [_gate_table(fold.gate), _gate_words(fold.gate)]
    else:
        blocks.append(Note(SOURCES.get(fold.source, "There is no report of a generator's gate in this folder, and no "
                                       "record of the source of the counterfactuals."), "quiet"))
    blocks += pictures(fold.gate_folder, [
        ("contact_sheet.png", "Held-out patients and their counterfactuals, with the differences",
         "Held-out patients and their counterfactuals: the acquisition changes, the patient does not."),
        ("figures.png", "Effectiveness of every intervention, and histograms of intensities before and after",
         "Top: predictions of an independent classifier for the counterfactuals. Bottom: intensities before and after, "
         "and of real images of the target group."),
    ], most_width, wide=True)
    return Section("gate", "The generator's gate", "Quality of the generated counterfactuals on held-out patients.",
                   "Every intervention is used; acquisition effects replace interventions that failed.", blocks)


def _gate_table(report: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for one, passed, words in verdicts(report):
        with_labels = as_number(one.get("dice_ratio"))
        anatomy = as_number(one.get("structure")) if math.isnan(with_labels) else with_labels
        rows.append([
            str(one.get("name")), Cell("passed", "good") if passed else Cell("not passed", "bad"),
            _shares(one.get("effectiveness")), _shares(one.get("kept")), _number(one.get("reversibility")),
            metric_text(anatomy, digits=2), _number(one.get("distance_ratio")), words or "none"])
    cases = f"{report.get('images', '?')} images of {report.get('cases', '?')} held-out cases"
    return table(f"Verdicts, on {cases}", ["intervention", "verdict", "effectiveness", "kept", "reversibility",
                                           "anatomy", "distance", "remarks"], rows)


def _shares(attributes: Any) -> str:
    return ", ".join(f"{one.get('attribute')} {_number(one.get('share'))} ({_number(one.get('accuracy'))})"
                     for one in map(as_object, as_list(attributes))) or "-"


def _number(content: Any) -> str:
    return metric_text(as_number(content), digits=2)


def _gate_words(report: Mapping[str, Any]) -> Block:
    limits = as_object(report.get("settings"))
    thresholds = ", ".join(f"{name} {as_number(limits.get(name)):g}" for name in (
        "effectiveness", "predictability", "composition", "reversibility", "anatomy", "structure", "distance")
        if name in limits)
    enabled = [("gate", "switched off (gate.enabled): every intervention is used, whatever its metrics")]
    entries = [*GATE_WORDS, ("limits", thresholds or "not recorded")]
    return Definitions([*entries, *(enabled if limits.get("enabled") is False else [])])


def probe(fold: FoldFolder, most_width: int) -> Section:
    """Metrics of frozen features."""
    models = probe_models(fold.probe)
    remarks = [str(line).replace("`", "") for line in as_list(fold.probe.get("remarks"))]
    blocks: list[Block] = [Note(f"Caution: {line}.", "quiet") for line in remarks]
    if models:
        blocks += probe_tables({str(model.get("model")): model for model in models})
    else:
        blocks.append(Note("There are no results; nnunet_cfcl probe computes them.", "quiet"))
    blocks += pictures(fold.probe_folder, [(
        "probe.png", "Metrics of the probe for every model, with intervals", "Metrics of the probe.")], most_width,
        wide=True)
    return Section("probe", "Probe of frozen features", "Metrics of the last decoder map without further training.",
                   "Classes are separable, and the distance between an image and its counterfactual is small "
                   "relative to that between classes.", blocks)


def probe_tables(models: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Build the metrics by model, the Dice of the linear probe by class, and the definitions of the metrics.

    Args:
        models: name -> entry of ``probe.json``.
    """
    meanings = {key: as_object(words) for model in models.values()
                for key, words in as_object(model.get("meaning")).items()}
    titles = {key: str(meanings.get(key, {}).get("title", key)) for model in models.values()
               for key in as_object(model.get("figures"))}
    dice = {label: " ".join(filter(None, (label, f"({name})" if (name := as_object(one).get("name")) else "")))
            for model in models.values() for label, one in as_object(model.get("probe_dice")).items()}
    blocks: list[Block] = [_model_table("Metrics, mean [95 % interval over patients]", models, "figures", titles)]
    if dice:
        blocks.append(_model_table("Dice of the linear probe, by class", models, "probe_dice", dice))
    words = [(titles[key], str(meanings[key].get("words", ""))) for key in titles if key in meanings]
    return [*blocks, *([Definitions(words)] if words else [])]


def _model_table(
    caption: str, models: Mapping[str, Mapping[str, Any]], part: str, heads: Mapping[str, str]
) -> Table:
    rows: list[Sequence[str | Cell]] = []
    for name, model in models.items():
        found = as_object(model.get(part))
        rows.append([name, *(_interval(as_object(found.get(key))) for key in heads)])
    return table(caption, ["model", *heads.values()], rows)


def _interval(one: Mapping[str, Any]) -> str:
    text = interval_of(one, "mean")
    chance = as_number(one.get("by_chance"))
    return text if math.isnan(chance) else f"{text}, by chance {chance:.3f}"


def nnunet_metrics(fold: FoldFolder) -> list[Block]:
    """Table of nnU-Net's own Dice, for folds without an evaluation."""
    found = nnunet_dice(fold)
    return [table("nnU-Net's own summary: mean Dice", ["label", "Dice"],
                  [[label, metric_text(value)] for label, value in found.items()])] if found else []
