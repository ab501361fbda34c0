"""Result of `nnunet_cfcl probe` as JSON and as a Markdown page.

``probe.json``::

    {"format": 1,
     "versions": {"nnunet_cfcl": ..., "scikit-learn": ...},
     "models": [{
        "model": name, "weights": file or null, "weights_digest": ..., "dataset": "Dataset004_Hippocampus",
        "configuration": "3d_fullres", "plans": "nnUNetPlans", "fold": 0, "seed": 0,
        "image_set": digest of cases, drawn voxels and counterfactuals; only models with the same digest are comparable,
        "cases": {"training": [case, ...], "validation": [case, ...]},
        "voxels": {"training": number of drawn voxels, "validation": number of drawn voxels},
        "counterfactuals": {"source": "acquisition", ...},
        "figures": {metric: {"mean": ..., "low": ..., "high": ..., "by_chance": ..., "more_is_better": true}},
        "probe_dice": {label: {"name": ..., "mean": ..., "low": ..., "high": ...}},
        "per_case": [{"case": ..., "patient": ..., "group": scanner or null, metric: value, ...,
                      "dice": {label: value}}],
        "unseen_labels": [labels of the validation cases without a drawn training voxel],
        "meaning": {metric: {"title": ..., "words": sentence}} }],
     "differences": [{"model", "against", "figure": metric, "cases", "difference", "low", "high", "p_value"}],
     "remarks": [caveats]}

``low`` and ``high`` are the ends of a 95 % interval over patients. Only the gap of the groups has ``by_chance``; it is
computed over all cases and has no value per case. Values that do not exist are null.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sklearn

import nnunet_cfcl
from nnunet_cfcl.evaluation.masks.report import FEW_PATIENTS
from nnunet_cfcl.evaluation.plain_tables import markdown_table, without_nan
from nnunet_cfcl.evaluation.probe.measure import FEWEST_IN_GROUP, Probe
from nnunet_cfcl.evaluation.probe.results import (
    DESCRIPTIONS,
    METRICS,
    Estimate,
    MetricDescription,
    ModelMetrics,
    PairedDifference,
    gap_description,
)
from nnunet_cfcl.files.atomic import write_text_atomically

NUMBERS, PAGE = "probe.json", "probe.md"
FORMAT = 1

LIMITS = """\
- The set is small: intervals cover its patients, not the variation between trainings of the same model.
- Distances are between features standardised channel by channel, over the drawn training voxels of each model.
- Source of the counterfactuals: {source}. Invariance to other changes is not measured.
- A linear probe finds what a *linear* layer can separate. Fine-tuning changes the features and may find more."""


@dataclass(frozen=True)
class ProbeResult:
    """Everything that a report needs.

    Attributes:
        probe: images, voxels and settings of the measurement.
        models: metrics of each model, in the order of the tables.
        differences: every model after the first compared with the first.
        dataset: name of the dataset.
        configuration: name of the configuration.
        plans: identifier of the plans.
        fold: number of the fold.
        label_names: label -> name in dataset.json.
        notes: caveats found before the measurement.
    """

    probe: Probe
    models: tuple[ModelMetrics, ...]
    differences: tuple[PairedDifference, ...]
    dataset: str
    configuration: str
    plans: str
    fold: int | str
    label_names: dict[int, str]
    notes: tuple[str, ...] = ()

    def description(self, metric: str) -> MetricDescription:
        """Description of a metric, the gap of the groups included."""
        return DESCRIPTIONS.get(metric) or gap_description(self.probe.column)

    def label(self, label: int) -> str:
        """Number and name of a label."""
        name = self.label_names.get(label)
        return f"{label} ({name})" if name else str(label)

    @property
    def names(self) -> list[str]:
        """All metrics of the models."""
        return list(dict.fromkeys(name for model in self.models for name in model.estimates))


def write_report(folder: Path, result: ProbeResult) -> None:
    """Write `NUMBERS` and `PAGE`, atomically."""
    text = json.dumps(without_nan(to_json(result)), indent=1, allow_nan=False, ensure_ascii=False)
    write_text_atomically(folder / NUMBERS, text + "\n")
    write_text_atomically(folder / PAGE, page(result))


def to_json(result: ProbeResult) -> dict[str, Any]:
    """Convert a result to the format in the module's docstring."""
    return {
        "format": FORMAT,
        "versions": {"nnunet_cfcl": nnunet_cfcl.__version__, "scikit-learn": sklearn.__version__},
        "models": [_model_json(result, model) for model in result.models],
        "differences": [asdict(one) for one in result.differences],
        "remarks": remarks(result),
    }


def _model_json(result: ProbeResult, model: ModelMetrics) -> dict[str, Any]:
    probe, images = result.probe, result.probe.images
    return {
        "model": model.name, "weights": None if model.file is None else str(model.file),
        "weights_digest": model.weights, "dataset": result.dataset, "configuration": result.configuration,
        "plans": result.plans, "fold": result.fold, "seed": probe.seed, "image_set": probe.image_set,
        "cases": {"training": list(images.training), "validation": list(images.validation)},
        "voxels": {"training": sum(len(patch.labels) for patch in images.training_patches),
                   "validation": sum(len(patch.labels) for patch in images.validation_patches)},
        "counterfactuals": probe.change.source.identity(),
        "figures": {name: {**asdict(estimate), "more_is_better": result.description(name).more_is_better}
                    for name, estimate in model.estimates.items()},
        "probe_dice": {str(label): {"name": result.label_names.get(label, ""), "mean": one.mean, "low": one.low,
                                    "high": one.high} for label, one in model.dice_estimates.items()},
        "per_case": [_case_json(result, model, row) for row in range(len(model.cases))],
        "unseen_labels": list(model.unseen),
        "meaning": {name: {"title": result.description(name).title, "words": result.description(name).words}
                    for name in model.estimates},
    }


def _case_json(result: ProbeResult, model: ModelMetrics, row: int) -> dict[str, Any]:
    case = model.cases[row]
    return {"case": case, "patient": result.probe.patients[row], "group": result.probe.groups.get(case),
            **{name: float(column[row]) for name, column in model.values.items()},
            "dice": {str(label): float(column[row]) for label, column in model.dice.items()}}


def remarks(result: ProbeResult) -> list[str]:
    """List caveats that a reader must know before the metrics."""
    probe, lines = result.probe, list(result.notes)
    if (count := len(set(probe.patients))) < FEW_PATIENTS:
        lines.append(f"the validation cases are of {count} patients only: their intervals are unreliable")
    if not probe.groups:
        lines.append(f"no {probe.column} gap: attributes.csv has no two values of '{probe.column}' with at least "
                     f"{FEWEST_IN_GROUP} validation cases each")
    if unseen := sorted({label for model in result.models for label in model.unseen}):
        lines.append(f"no voxel of {', '.join(map(result.label, unseen))} was drawn from the training cases: its Dice "
                     "is 0 for every model")
    return lines


def page(result: ProbeResult) -> str:
    """Format a result as Markdown."""
    images = result.probe.images
    source = result.probe.change.source.name
    parts = [
        f"# Probe of frozen features: {', '.join(model.name for model in result.models)}",
        f"{result.dataset}, {result.configuration}, plans {result.plans}, fold {result.fold}; last decoder map. "
        f"{len(images.training)} training and {len(images.validation)} validation cases, seed {result.probe.seed}, "
        f"image set `{result.probe.image_set}`: only results with the same image set are comparable.",
    ]
    if lines := remarks(result):
        parts += ["## Caveats", "\n".join(f"- {line}" for line in lines)]
    parts += ["## Metrics", _metric_table(result), "## Linear probe Dice per class", _dice_table(result)]
    if result.differences:
        parts += [f"## Paired differences to {result.models[0].name}", _difference_table(result)]
    words = [f"- **{result.description(name).title}**: {result.description(name).words}" for name in result.names]
    words.append("- Every value is a mean over validation cases with its 95 % interval in brackets (BCa bootstrap over "
                 "patients). **p**: sign-flip test over patients, not corrected for multiple comparisons.")
    parts += ["## Definitions", "\n".join(words), "## Limitations", LIMITS.format(source=source)]
    return "\n\n".join(parts) + "\n"


def _metric_table(result: ProbeResult) -> str:
    heads = [f"{metric.title}, {'more' if metric.more_is_better else 'less'} is better"
             for metric in map(result.description, result.names)]
    return markdown_table(["model", *heads], [[model.name, *(number(model.estimates[name]) for name in result.names)]
                                              for model in result.models])


def _dice_table(result: ProbeResult) -> str:
    return markdown_table(["class", *(model.name for model in result.models)],
                          [[result.label(label), *(number(model.dice_estimates[label]) for model in result.models)]
                           for label in result.probe.labels])


def _difference_table(result: ProbeResult) -> str:
    rows: dict[str, list[str]] = {}
    for one in result.differences:
        shown = number(Estimate(one.difference, one.low, one.high), signed=True)
        rows.setdefault(one.model, [one.model]).append(
            shown if math.isnan(one.low) else f"{shown}, p {one.p_value:.2g}")
    return markdown_table(["model", *(DESCRIPTIONS[name].title for name in METRICS)], list(rows.values()))


def number(estimate: Estimate, signed: bool = False) -> str:
    """Format an estimate with its interval, for tables."""
    sign = "+" if signed else ""
    if math.isnan(estimate.mean):
        return "none"
    text = f"{estimate.mean:{sign}.3f}"
    text += "" if math.isnan(estimate.low) else f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return text + (f", by chance {estimate.by_chance:.3f}" if estimate.by_chance is not None else "")


def short_summary(result: ProbeResult) -> list[str]:
    """One line per model for the terminal."""
    return [f"{model.name}: " + ", ".join(f"{result.description(name).title} {estimate.mean:.3f}"
                                          for name, estimate in model.estimates.items()) for model in result.models]
