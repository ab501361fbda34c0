"""State of every phase of a fold: generator, pretraining, training and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nnunet_cfcl.evaluation.report.blocks import Cell, Tone, duration
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder
from nnunet_cfcl.files.lenient_json import as_list, as_number, as_object
from nnunet_cfcl.nnunet.fold_files import LATEST, SUMMARY, VALIDATION

SOURCES = {
    "acquisition": "Counterfactuals are analytic interventions on the acquisition (transfer curve, sharpness, noise, "
                   "bias field); no generator was trained.",
    "precomputed": "Counterfactuals were imported (a counterfactual store); no generator was trained here.",
    "none": "This method uses no counterfactuals.",
}


def phases(fold: FoldFolder) -> list[tuple[str, Cell, str]]:
    """List phase, state and details of generator, pretraining, training and validation."""
    return [("generator", *_generator_state(fold)), ("pretraining", *_pretraining_state(fold)),
            ("nnU-Net's training", *_training_state(fold)), ("final validation", *_validation_state(fold))]


def _generator_state(fold: FoldFolder) -> tuple[Cell, str]:
    found = verdicts(fold.gate)
    if not found:
        return Cell("none", "quiet"), SOURCES.get(fold.source, "there is no report of a gate")
    passed, count = sum(ok for _, ok, _ in found), len(found)
    used = "all are used"
    if as_object(fold.gate.get("settings")).get("enabled") is False:
        used = "all are used nevertheless (gate.enabled is false)"
    elif passed < count:
        used = f"acquisition effects replace {'the others' if passed else 'all'}"
    tone: Tone = "good" if passed == count else "bad"
    return Cell(f"{passed} of {count} passed", tone), f"interventions at the gate; {used}"


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
        return Cell("not finished", "bad"), f"{done}, {duration(spent)}: stopped or running; resume with --c"
    return Cell("none", "quiet"), "the trainer has no pretraining, or has not started it"


def _training_state(fold: FoldFolder) -> tuple[Cell, str]:
    training = fold.training
    planned = training.planned or as_number(fold.settings.get("finetune.epochs"))
    last = int(training.epochs[-1]["epoch"]) + 1 if training.epochs else 0
    done = f"{last} of {planned:.0f} epochs" if math.isfinite(planned) else f"{last} epochs"
    spent = sum(line.get("seconds", 0.0) for line in training.epochs)
    when = f", started {training.started:%Y-%m-%d %H:%M}, last entry {training.ended:%Y-%m-%d %H:%M}" if (
        training.started and training.ended) else ""
    if fold.is_trained:
        return Cell("finished", "good"), f"{done}, {duration(spent)}{when}"
    if last or (fold.place.folder / LATEST).is_file():
        return Cell("not finished", "bad"), f"{done}, {duration(spent)}{when}: stopped or running; resume with --c"
    return Cell("not started", "quiet"), when.removeprefix(", ") or "there is no log"


def _validation_state(fold: FoldFolder) -> tuple[Cell, str]:
    count = f"{len(fold.validation)} masks"
    if (fold.place.folder / VALIDATION / SUMMARY).is_file():
        return Cell("finished", "good"), count
    if fold.validation:
        return Cell("not finished", "bad"), f"{count}; nnUNetv2_train with --val writes all"
    return Cell("none", "quiet"), "there are no masks, which nnU-Net writes after the training"


def verdicts(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], bool, str]]:
    """List metrics, passed, and remarks of every intervention."""
    found = []
    for one in as_list(report.get("interventions")):
        verdict = as_object(as_object(one).get("verdict"))
        words = [str(word) for key in ("reasons", "remarks") for word in as_list(verdict.get(key))]
        if verdict:
            found.append((as_object(one), verdict.get("passed") is True, "; ".join(words)))
    return found
