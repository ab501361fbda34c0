"""The result of `nnunet_cfcl probe` as JSON and as a page to read.

``probe.json``::

    {"format": 1,
     "versions": {"nnunet_cfcl": ..., "scikit-learn": ...},
     "models": [{
        "model": name, "weights": file or null, "weights_digest": ..., "dataset": "Dataset004_Hippocampus",
        "configuration": "3d_fullres", "plans": "nnUNetPlans", "fold": 0, "seed": 0,
        "image_set": digest of cases, drawn voxels and counterfactuals; only figures of the same set can be compared,
        "cases": {"training": [case, ...], "validation": [case, ...]},
        "voxels": {"training": drawn voxels, "validation": drawn voxels},
        "counterfactuals": {"source": "acquisition", ...},
        "figures": {name: {"mean": ..., "low": ..., "high": ..., "by_chance": ..., "more_is_better": true}},
        "probe_dice": {label: {"name": ..., "mean": ..., "low": ..., "high": ...}},
        "per_case": [{"case": ..., "patient": ..., "group": scanner or null, name of a figure: value, ...,
                      "dice": {label: value}}],
        "unseen_labels": [labels of the validation without a drawn training voxel],
        "meaning": {name: {"title": ..., "words": sentence}} }],
     "differences": [{"model", "against", "figure", "cases", "difference", "low", "high", "p_value"}],
     "remarks": [what a reader must know first]}

``low`` and ``high`` end a 95 % interval over patients; ``by_chance`` is there for the gap of groups alone, which is of
all cases and has no value per case. null: there is no figure.
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
from nnunet_cfcl.evaluation.probe.bench import (
    FEWEST_IN_GROUP,
    FIGURES,
    MEANINGS,
    Bench,
    Figure,
    Meaning,
    ModelFigures,
    PairedDifference,
    gap_meaning,
)
from nnunet_cfcl.files.atomic import write_text_atomically

NUMBERS, PAGE = "probe.json", "probe.md"
FORMAT = 1

LIMITS = """\
- The set is small: intervals are over its patients, and say nothing of another training of the same model.
- Distances are of features that are standardised channel by channel, over the drawn training voxels of each model.
- Counterfactuals are made by: {source}. How invariant features are to other changes is not seen here.
- A linear probe asks what a *linear* layer finds. Fine-tuning changes the features, and may find more."""


@dataclass(frozen=True)
class Probed:
    """All there is to report.

    Attributes:
        bench: what was measured with.
        models: in the order of the tables.
        differences: every model after the first against the first.
        plans, configuration, dataset: of the fold.
        fold: number.
        label_names: label -> name in dataset.json.
        notes: lines for the reader, from what came before.
    """

    bench: Bench
    models: tuple[ModelFigures, ...]
    differences: tuple[PairedDifference, ...]
    dataset: str
    configuration: str
    plans: str
    fold: int | str
    label_names: dict[int, str]
    notes: tuple[str, ...] = ()

    def meaning(self, figure: str) -> Meaning:
        """Of a figure, the gap of the groups included."""
        return MEANINGS.get(figure) or gap_meaning(self.bench.column)

    def label(self, label: int) -> str:
        """Number and name."""
        name = self.label_names.get(label)
        return f"{label} ({name})" if name else str(label)

    @property
    def names(self) -> list[str]:
        """Of all figures that the models have."""
        return list(dict.fromkeys(name for model in self.models for name in model.figures))


def write_report(folder: Path, probed: Probed) -> None:
    """Write `NUMBERS` and `PAGE`, atomically."""
    text = json.dumps(without_nan(to_json(probed)), indent=1, allow_nan=False, ensure_ascii=False)
    write_text_atomically(folder / NUMBERS, text + "\n")
    write_text_atomically(folder / PAGE, page(probed))


def to_json(probed: Probed) -> dict[str, Any]:
    """See the module's docstring."""
    return {
        "format": FORMAT,
        "versions": {"nnunet_cfcl": nnunet_cfcl.__version__, "scikit-learn": sklearn.__version__},
        "models": [_model_json(probed, model) for model in probed.models],
        "differences": [asdict(one) for one in probed.differences],
        "remarks": remarks(probed),
    }


def _model_json(probed: Probed, model: ModelFigures) -> dict[str, Any]:
    bench, material = probed.bench, probed.bench.material
    return {
        "model": model.name, "weights": None if model.file is None else str(model.file),
        "weights_digest": model.weights, "dataset": probed.dataset, "configuration": probed.configuration,
        "plans": probed.plans, "fold": probed.fold, "seed": bench.seed, "image_set": probed.bench.image_set,
        "cases": {"training": list(material.training), "validation": list(material.validation)},
        "voxels": {"training": sum(len(patch.labels) for patch in material.training_patches),
                   "validation": sum(len(patch.labels) for patch in material.validation_patches)},
        "counterfactuals": bench.change.source.identity(),
        "figures": {name: {**asdict(figure), "more_is_better": probed.meaning(name).more_is_better}
                    for name, figure in model.figures.items()},
        "probe_dice": {str(label): {"name": probed.label_names.get(label, ""), "mean": one.mean, "low": one.low,
                                    "high": one.high} for label, one in model.dice_figures.items()},
        "per_case": [_case_json(probed, model, row) for row in range(len(model.cases))],
        "unseen_labels": list(model.unseen),
        "meaning": {name: {"title": probed.meaning(name).title, "words": probed.meaning(name).words}
                    for name in model.figures},
    }


def _case_json(probed: Probed, model: ModelFigures, row: int) -> dict[str, Any]:
    case = model.cases[row]
    return {"case": case, "patient": probed.bench.patients[row], "group": probed.bench.groups.get(case),
            **{name: float(column[row]) for name, column in model.values.items()},
            "dice": {str(label): float(column[row]) for label, column in model.dice.items()}}


def remarks(probed: Probed) -> list[str]:
    """What a reader must know before the figures."""
    bench, lines = probed.bench, list(probed.notes)
    if (count := len(set(bench.patients))) < FEW_PATIENTS:
        lines.append(f"the validation cases are of {count} patients: intervals are hardly more than a guess")
    if not bench.groups:
        lines.append(f"no {bench.column} gap: attributes.csv names no two values of '{bench.column}' that "
                     f"{FEWEST_IN_GROUP} validation cases each have")
    if unseen := sorted({label for model in probed.models for label in model.unseen}):
        lines.append(f"no voxel of {', '.join(map(probed.label, unseen))} was drawn from the training cases: its Dice "
                     "is 0 for every model")
    return lines


def page(probed: Probed) -> str:
    """The result as Markdown."""
    material = probed.bench.material
    source = probed.bench.change.source.name
    parts = [
        f"# Probe of frozen features: {', '.join(model.name for model in probed.models)}",
        f"{probed.dataset}, {probed.configuration}, plans {probed.plans}, fold {probed.fold}; last decoder map. "
        f"{len(material.training)} training and {len(material.validation)} validation cases, seed {probed.bench.seed}, "
        f"image set `{probed.bench.image_set}`: only figures of the same image set can be compared.",
    ]
    if lines := remarks(probed):
        parts += ["## Mind", "\n".join(f"- {line}" for line in lines)]
    parts += ["## Figures", _figure_table(probed), "## Linear probe Dice per class", _dice_table(probed)]
    if probed.differences:
        parts += [f"## Differences to {probed.models[0].name}, case by case", _difference_table(probed)]
    words = [f"- **{probed.meaning(name).title}**: {probed.meaning(name).words}" for name in probed.names]
    words.append("- Every figure is a mean over validation cases, in brackets its 95 % interval (BCa bootstrap over "
                 "patients). **p**: sign-flip test over patients, corrected for no other comparison.")
    parts += ["## What the figures mean", "\n".join(words), "## What they do not tell", LIMITS.format(source=source)]
    return "\n\n".join(parts) + "\n"


def _figure_table(probed: Probed) -> str:
    heads = [f"{probed.meaning(name).title}, {'more' if probed.meaning(name).more_is_better else 'less'} is better"
             for name in probed.names]
    return markdown_table(["model", *heads], [[model.name, *(number(model.figures[name]) for name in probed.names)]
                                     for model in probed.models])


def _dice_table(probed: Probed) -> str:
    return markdown_table(["class", *(model.name for model in probed.models)],
                 [[probed.label(label), *(number(model.dice_figures[label]) for model in probed.models)]
                  for label in probed.bench.labels])


def _difference_table(probed: Probed) -> str:
    rows: dict[str, list[str]] = {}
    for one in probed.differences:
        shown = number(Figure(one.difference, one.low, one.high), signed=True)
        rows.setdefault(one.model, [one.model]).append(
            shown if math.isnan(one.low) else f"{shown}, p {one.p_value:.2g}")
    return markdown_table(["model", *(MEANINGS[name].title for name in FIGURES)], list(rows.values()))


def number(figure: Figure, signed: bool = False) -> str:
    """A figure with its interval, for tables."""
    sign = "+" if signed else ""
    if math.isnan(figure.mean):
        return "none"
    text = f"{figure.mean:{sign}.3f}"
    text += "" if math.isnan(figure.low) else f" [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"
    return text + (f", by chance {figure.by_chance:.3f}" if figure.by_chance is not None else "")


def short_summary(probed: Probed) -> list[str]:
    """A line per model for the terminal."""
    return [f"{model.name}: " + ", ".join(f"{probed.meaning(name).title} {figure.mean:.3f}"
                                          for name, figure in model.figures.items()) for model in probed.models]
