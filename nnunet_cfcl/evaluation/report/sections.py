"""The sections about one fold that need nothing but its folder: overview, settings, curves, gate, probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Cell,
    Figure,
    Fold,
    Mood,
    Note,
    Section,
    Table,
    Words,
    duration,
    figure_text,
    interval_of,
    pictures,
    table,
    value_text,
)
from nnunet_cfcl.evaluation.report.curves import pretraining_curves, training_curves
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder, nnunet_dice, probe_models, setting_rows
from nnunet_cfcl.files.lenient_json import as_list, as_number, as_object
from nnunet_cfcl.nnunet.fold_files import LATEST, SUMMARY, VALIDATION
from nnunet_cfcl.pretraining.monitor import collapse_warning

GATE_WORDS = (
    ("effectiveness", "share of the counterfactuals that an independent network takes for what they should look like; "
     "in brackets the share of real images that it tells correctly"),
    ("kept", "the same for the attributes that were not to change"),
    ("reversibility", "what is left of the change after going there and back; 0 is perfect"),
    ("anatomy", "how well a small segmentation network finds the original's organs in the counterfactual, relative to "
     "the original (1: as well); without labels how well the edges of the two images agree"),
    ("distance", "how far the intensities are from those of real images of the target group, relative to the "
     "originals'; 0 is perfect, 1 is no nearer than before"),
)
SOURCES = {
    "acquisition": "Counterfactuals are analytic interventions on the acquisition (transfer curve, sharpness, noise, "
                   "bias field); no generator was trained.",
    "precomputed": "Counterfactuals were brought in from elsewhere (a counterfactual store); no generator was trained "
                   "here.",
    "none": "This method uses no counterfactuals.",
}


def overview(fold: FoldFolder) -> Section:
    """What this is, and how far it has come."""
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
    blocks.append(table("How far it has come", ["phase", "state", "in words"], phases(fold)))
    blocks.append(table("What it is", ["what", "value"], facts))
    return Section("overview", "Overview", "What was trained, on what, and how far it has come.",
                   "All phases are finished.", blocks)


def _hash(fold: FoldFolder) -> str | Cell:
    found = str(fold.config.get("settings_hash", "none recorded"))
    if fold.hash_is_right is False:
        return Cell(f"{found}, which is not the hash of the settings in this file: it was changed by hand", "bad")
    return found


def phases(fold: FoldFolder) -> list[tuple[str, Cell, str]]:
    """(phase, state, in words) of generator, pretraining, training and validation."""
    return [("generator", *_generator_state(fold)), ("pretraining", *_pretraining_state(fold)),
            ("nnU-Net's training", *_training_state(fold)), ("final validation", *_validation_state(fold))]


def _generator_state(fold: FoldFolder) -> tuple[Cell, str]:
    verdicts = _verdicts(fold.gate)
    if not verdicts:
        return Cell("none", "quiet"), SOURCES.get(fold.source, "there is no report of a gate")
    passed, all_of_them = sum(ok for _, ok, _ in verdicts), len(verdicts)
    used = "all are used"
    if as_object(fold.gate.get("settings")).get("enabled") is False:
        used = "all are used all the same (gate.enabled is false)"
    elif passed < all_of_them:
        used = f"acquisition effects take the place of {'the others' if passed else 'all'}"
    mood: Mood = "good" if passed == all_of_them else "bad"
    return Cell(f"{passed} of {all_of_them} passed", mood), f"interventions at the gate; {used}"


def _pretraining_state(fold: FoldFolder) -> tuple[Cell, str]:
    planned, lines = as_number(fold.settings.get("pretrain.epochs")), fold.pretraining
    done = f"{len(lines)} of {planned:.0f} epochs" if math.isfinite(planned) else f"{len(lines)} epochs"
    spent = sum(seconds for line in lines if math.isfinite(seconds := as_number(line.get("seconds"))))
    if fold.is_pretrained:
        return Cell("finished", "good"), f"{done}, {duration(spent)}"
    if (fold.pretraining_folder / "skipped.json").is_file():
        return Cell("skipped", "quiet"), "weights were given with -pretrained_weights"
    if fold.settings.get("pretrain.enabled") is False:
        return Cell("switched off", "quiet"), "pretrain.enabled is false"
    if lines:
        return Cell("not finished", "bad"), f"{done}, {duration(spent)}: stopped, or still at work; --c goes on"
    return Cell("none", "quiet"), "the trainer has no pretraining, or it has not begun"


def _training_state(fold: FoldFolder) -> tuple[Cell, str]:
    training = fold.training
    planned = training.planned or as_number(fold.settings.get("finetune.epochs"))
    last = int(training.epochs[-1]["epoch"]) + 1 if training.epochs else 0
    done = f"{last} of {planned:.0f} epochs" if math.isfinite(planned) else f"{last} epochs"
    spent = sum(line.get("seconds", 0.0) for line in training.epochs)
    when = f", begun {training.started:%Y-%m-%d %H:%M}, last heard of {training.ended:%Y-%m-%d %H:%M}" if (
        training.started and training.ended) else ""
    if fold.is_trained:
        return Cell("finished", "good"), f"{done}, {duration(spent)}{when}"
    if last or (fold.place.folder / LATEST).is_file():
        return Cell("not finished", "bad"), f"{done}, {duration(spent)}{when}: stopped, or still at work; --c goes on"
    return Cell("not begun", "quiet"), when.removeprefix(", ") or "there is no log of it"


def _validation_state(fold: FoldFolder) -> tuple[Cell, str]:
    count = f"{len(fold.validation)} masks"
    if (fold.place.folder / VALIDATION / SUMMARY).is_file():
        return Cell("finished", "good"), count
    if fold.validation:
        return Cell("not finished", "bad"), f"{count}; nnUNetv2_train with --val makes them all"
    return Cell("none", "quiet"), "there are no masks; nnU-Net makes them after the training"


def settings(fold: FoldFolder) -> Section:
    """Those that are not the defaults, and all of them."""
    rows = setting_rows(fold)
    blocks: list[Block] = []
    if not rows:
        blocks.append(Note("There is no cfcl/config.json: trainers of this plugin write it when they begin.", "quiet"))
    else:
        changed = [row for row in rows if row.differs]
        heads = ("setting", "value", "default", "meaning")
        cells = {row.key: [row.key, value_text(row.value), value_text(row.default) if row.known else "", row.meaning]
                 for row in rows}
        caption = f"{len(changed)} of {len(rows)} settings differ from the defaults"
        blocks.append(table(caption, heads, [cells[row.key] for row in changed]) if changed else
                      Note("All settings are the defaults."))
        blocks.append(Fold(f"All {len(rows)} settings", [table("All settings", heads, list(cells.values()))]))
    return Section("settings", "Settings", "What was set otherwise than by default.",
                   "You know of every line, and meant it.", blocks)


def curves(fold: FoldFolder, most_width: int) -> Section:
    """Both phases' curves and the views."""
    blocks = _figure(pretraining_curves(fold), "There are no curves of a pretraining.")
    if warning := _collapse(fold):
        blocks.append(Note(warning, "bad"))
    blocks += _figure(training_curves(fold), "There are no epochs in nnU-Net's training logs.")
    views = pictures(fold.pretraining_folder, [(
        "views.png", "Views of the first images of the pretraining, with corresponding points in the same colours",
        "The views of the first images. You should recognise the patient in every counterfactual, and points of one "
        "colour must lie at one place of the anatomy.")], most_width)
    blocks += views or [Note("There is no picture of the views (pretraining/views.png).", "quiet")]
    return Section("curves", "Curves and views", "How both phases went, epoch by epoch, and what was compared.",
                   "Pretraining: the loss falls well below guessing (dashed), alignment falls after the warm-up, "
                   "uniformity stays well below 0, the gradient norm settles. nnU-Net's training: both losses fall, "
                   "and the pseudo Dice rises and levels off.", blocks)


def _figure(picture: Any, otherwise: str) -> list[Block]:
    return [Note(otherwise, "quiet") if picture is None else Figure(picture)]


def _collapse(fold: FoldFolder) -> str | None:
    """The pretraining's own warning about its last epoch."""
    if not fold.pretraining:
        return None
    known = {key: number for key, value in fold.pretraining[-1].items() if math.isfinite(number := as_number(value))}
    return collapse_warning(known) if "loss" in known else None


def gate(fold: FoldFolder, most_width: int) -> Section:
    """Verdicts and pictures of the generator's gate."""
    blocks: list[Block] = []
    if fold.gate:
        blocks += [_gate_table(fold.gate), _gate_words(fold.gate)]
    else:
        blocks.append(Note(SOURCES.get(fold.source, "There is no report of a generator's gate in this folder, and "
                                       "nothing that says where counterfactuals came from."), "quiet"))
    blocks += pictures(fold.gate_folder, [
        ("contact_sheet.png", "Held-out patients and their counterfactuals, with the differences",
         "Held-out patients and their counterfactuals: the patient stays, the acquisition changes."),
        ("figures.png", "Effectiveness of every intervention, and histograms of intensities before and after",
         "Above: what an independent network takes the counterfactuals for. Below: intensities before, after, and of "
         "real images of the target group."),
    ], most_width, wide=True)
    return Section("gate", "The generator's gate", "What the generator of counterfactuals can do, judged on patients "
                   "it has not seen.", "Every intervention is used; one that is not has acquisition effects in its "
                   "place.", blocks)


def _verdicts(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], bool, str]]:
    """(figures, passed, why not) of every intervention."""
    found = []
    for one in as_list(report.get("interventions")):
        verdict = as_object(as_object(one).get("verdict"))
        words = [str(word) for key in ("reasons", "remarks") for word in as_list(verdict.get(key))]
        if verdict:
            found.append((as_object(one), verdict.get("passed") is True, "; ".join(words)))
    return found


def _gate_table(report: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for one, passed, words in _verdicts(report):
        with_labels = as_number(one.get("dice_ratio"))
        anatomy = as_number(one.get("structure")) if math.isnan(with_labels) else with_labels
        rows.append([
            str(one.get("name")), Cell("passed", "good") if passed else Cell("not passed", "bad"),
            _shares(one.get("effectiveness")), _shares(one.get("kept")), _number(one.get("reversibility")),
            figure_text(anatomy, digits=2), _number(one.get("distance_ratio")), words or "nothing to remark"])
    cases = f"{report.get('images', '?')} images of {report.get('cases', '?')} held-out cases"
    return table(f"Verdicts, on {cases}", ["intervention", "verdict", "effectiveness", "kept", "reversibility",
                                           "anatomy", "distance", "why"], rows)


def _shares(attributes: Any) -> str:
    return ", ".join(f"{one.get('attribute')} {_number(one.get('share'))} ({_number(one.get('accuracy'))})"
                     for one in map(as_object, as_list(attributes))) or "-"


def _number(content: Any) -> str:
    return figure_text(as_number(content), digits=2)


def _gate_words(report: Mapping[str, Any]) -> Block:
    limits = as_object(report.get("settings"))
    said = ", ".join(f"{name} {as_number(limits.get(name)):g}" for name in (
        "effectiveness", "predictability", "composition", "reversibility", "anatomy", "structure", "distance")
        if name in limits)
    enabled = [("gate", "switched off (gate.enabled): every intervention is used, whatever its figures")]
    entries = [*GATE_WORDS, ("limits", said or "not recorded")]
    return Words([*entries, *(enabled if limits.get("enabled") is False else [])])


def probe(fold: FoldFolder, most_width: int) -> Section:
    """What frozen features tell."""
    models = probe_models(fold.probe)
    remarks = [str(line).replace("`", "") for line in as_list(fold.probe.get("remarks"))]
    blocks: list[Block] = [Note(f"Mind: {line}.", "quiet") for line in remarks]
    if models:
        blocks += probe_tables({str(model.get("model")): model for model in models})
    else:
        blocks.append(Note("There are no figures; nnunet_cfcl probe measures them.", "quiet"))
    blocks += pictures(fold.probe_folder, [(
        "probe.png", "The probe's figures of every model, with intervals", "The probe's figures.")], most_width,
        wide=True)
    return Section("probe", "Probe of frozen features", "What the network's last feature map tells by itself, before "
                   "any further training.", "Classes are told apart, and the distance between an image and its "
                   "counterfactual is small beside that between classes.", blocks)


def probe_tables(models: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Figures by model, Dice of the linear probe by class, and what the figures mean.

    Args:
        models: name -> entry of ``probe.json``.
    """
    meanings = {key: as_object(words) for model in models.values()
                for key, words in as_object(model.get("meaning")).items()}
    figures = {key: str(meanings.get(key, {}).get("title", key)) for model in models.values()
               for key in as_object(model.get("figures"))}
    dice = {label: " ".join(filter(None, (label, f"({name})" if (name := as_object(one).get("name")) else "")))
            for model in models.values() for label, one in as_object(model.get("probe_dice")).items()}
    blocks: list[Block] = [_model_table("Figures, mean [95 % interval over patients]", models, "figures", figures)]
    if dice:
        blocks.append(_model_table("Dice of the linear probe, by class", models, "probe_dice", dice))
    words = [(figures[key], str(meanings[key].get("words", ""))) for key in figures if key in meanings]
    return [*blocks, *([Words(words)] if words else [])]


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
    """nnU-Net's own Dice, where there is nothing better."""
    found = nnunet_dice(fold)
    return [table("nnU-Net's own summary: mean Dice", ["label", "Dice"],
                  [[label, figure_text(value)] for label, value in found.items()])] if found else []
