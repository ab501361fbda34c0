"""Results of an evaluation as files: a CSV table per method, all records as JSON, and a Markdown page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import monai

import nnunet_cfcl
from nnunet_cfcl.evaluation.masks.measure import Measurements, MethodMetrics
from nnunet_cfcl.evaluation.masks.metrics import METRICS
from nnunet_cfcl.evaluation.masks.summary import PENALISED, SUMMARISED, Difference, Gap, Records, Summary
from nnunet_cfcl.evaluation.masks.tables import ALL, CaseAttributes, LabelScheme
from nnunet_cfcl.evaluation.plain_tables import escaped, markdown_table, without_nan
from nnunet_cfcl.evaluation.statistics import EXACT_PATIENTS, FLIPS, LEVEL, RESAMPLES
from nnunet_cfcl.files.atomic import write_text_atomically

TABLE, NUMBERS, PAGE = "metrics.csv", "metrics.json", "metrics.md"
FORMAT = 1
#: Fewest patients for a reliable interval.
FEW_PATIENTS = 8
DIGITS = {"dice": 3, "nsd": 3}

LEGEND = """\
- Every value is a mean over cases with its 95 % interval in brackets: BCa bootstrap over patients, resampled with all
  their cases.
- **Dice**: overlap, 1 is perfect. **NSD**: share of the two surfaces within {tolerance:g} {unit} of each other, 1 is
  perfect. **HD95**: 95th percentile of the surface distances, **ASSD**: average symmetric surface distance, both in
  {unit}, 0 is perfect.
- **missed**: cases with the label in exactly one of truth and prediction. Their Dice and NSD are 0; *they have no
  surface distance, and HD95 and ASSD leave them out*. **with misses**: the same metric with the image diagonal, the
  longest possible distance, for these cases. **in neither**: cases with the label in neither mask, which are left out.
- **gap**: difference between the means of the worst and the best group (without "unknown"). The two groups are chosen
  by their results, which overestimates gaps between small groups; the interval does not account for this."""
PAIRED = """\
- **differences**: {first} minus the other method, case by case, over the cases with values of both; **left out**:
  common cases without a value of one or both. **p**: sign-flip test over patients (exact for up to {exact} patients
  with a difference, else {flips} random flips). {count} comparisons are listed, without correction for multiple
  comparisons: choose the primary comparison in advance."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report needs.

    Attributes:
        truth: folder of the true masks.
        measured: metrics of all methods.
        records: their statistics.
        scheme: evaluated labels.
        attributes: attributes of the cases.
        by: columns to group by.
        tolerance: tolerance of the normalised surface Dice in mm or pixels.
        seed: seed of resamples and permutations.
    """

    truth: Path
    measured: Measurements
    records: Records
    scheme: LabelScheme
    attributes: CaseAttributes
    by: tuple[str, ...]
    tolerance: float
    seed: int

    @property
    def unit(self) -> str:
        """Unit of all distances."""
        return "pixels" if self.measured.in_pixels else "mm"

    def label_name(self, label: int) -> str:
        """Number of a label, with its name where dataset.json has one."""
        name = (self.scheme.names or {}).get(label)
        return f"{label} ({name})" if name else str(label)


def write_tables(folder: Path, evaluation: Evaluation) -> None:
    """Write `TABLE`, ``metrics_NAME.csv`` of every other method, `NUMBERS` and `PAGE`, each atomically.

    Args:
        folder: existing folder.
        evaluation: results to write.
    """
    first, *others = evaluation.measured.methods
    for file, method in [(TABLE, first), *((f"metrics_{other.name}.csv", other) for other in others)]:
        write_text_atomically(folder / file, csv_text(method, evaluation.attributes))
    text = json.dumps(without_nan(to_json(evaluation)), indent=1, allow_nan=False, ensure_ascii=False)
    write_text_atomically(folder / NUMBERS, text + "\n")
    write_text_atomically(folder / PAGE, page(evaluation))


def csv_text(method: MethodMetrics, attributes: CaseAttributes) -> str:
    """Format one row per case and label: case, label, metrics ("nan" where undefined), attributes."""
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(["case", "label", *METRICS, *attributes.columns])
    for case, rows in zip(method.cases, method.values):
        cells = [cells[case] for cells in attributes.columns.values()]
        writer.writerows([case, label, *(repr(float(value)) for value in row), *cells]
                         for label, row in zip(method.labels, rows))
    return handle.getvalue()


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Convert an evaluation to the JSON format that docs/how-to/evaluate.md documents."""
    first, *others = evaluation.measured.methods
    names = evaluation.scheme.names or {}
    return {
        "format": FORMAT,
        "settings": {
            "predictions": {first.name: str(first.folder)}, "truth": str(evaluation.truth),
            "against": {other.name: str(other.folder) for other in others},
            "labels": list(first.labels), "label_names": {str(label): name for label, name in names.items()},
            "dataset_json": _text_or_none(evaluation.scheme.source), "ignore_label": evaluation.scheme.ignore,
            "undeclared_labels": list(evaluation.measured.undeclared), "unit": evaluation.unit,
            "tolerance": evaluation.tolerance, "attributes": _text_or_none(evaluation.attributes.file),
            "by": list(evaluation.by), "seed": evaluation.seed, "level": LEVEL, "resamples": RESAMPLES,
            "exact_patients": EXACT_PATIENTS, "flips": FLIPS,
            "versions": {"nnunet_cfcl": nnunet_cfcl.__version__, "monai": monai.__version__}},
        "missing": {method.name: {"without_prediction": list(method.without_prediction),
                                  "without_truth": list(method.without_truth)}
                    for method in evaluation.measured.methods},
        "without_attributes": list(evaluation.attributes.without_row),
        "summaries": [asdict(record) for record in evaluation.records.summaries],
        "gaps": [asdict(record) for record in evaluation.records.gaps],
        "differences": [asdict(record) for record in evaluation.records.differences]}


def _text_or_none(file: Path | None) -> str | None:
    return None if file is None else str(file)


def remarks(evaluation: Evaluation) -> list[str]:
    """List caveats that a reader must know before the metrics: missing cases, labels left out, small groups."""
    lines = []
    for method in evaluation.measured.methods:
        missing = {"a truth but no prediction": method.without_prediction,
                   "a prediction but no truth": method.without_truth}
        lines += [f"{method.name}: {_cases(cases)} with {what}, not evaluated: {', '.join(cases)}"
                  for what, cases in missing.items() if cases]
    if cases := evaluation.attributes.without_row:
        lines.append(f"{_cases(cases)} without a row in {evaluation.attributes.file}, in the group \"unknown\": "
                     f"{', '.join(cases)}")
    if evaluation.measured.undeclared:
        lines.append(f"labels in the masks but not in {evaluation.scheme.source}, not evaluated: "
                     f"{', '.join(map(str, evaluation.measured.undeclared))}")
    if evaluation.scheme.regions:
        lines.append(f"{evaluation.scheme.source} defines regions; their plain labels are evaluated")
    small = {f"{record.group} ({record.grouping})": None for record in evaluation.records.summaries
             if record.metric == METRICS[0] and 0 < record.patients < FEW_PATIENTS}
    if small:
        lines.append(f"groups of fewer than {FEW_PATIENTS} patients, with unreliable intervals: {', '.join(small)}")
    return lines


def _cases(cases: Sequence[str]) -> str:
    return f"{len(cases)} case{'' if len(cases) == 1 else 's'}"


def page(evaluation: Evaluation) -> str:
    """Format an evaluation as Markdown."""
    first, *others = evaluation.measured.methods
    records = evaluation.records
    patients = len({evaluation.attributes.patient(case) for case in first.cases})
    against = f", compared with {', '.join(other.name for other in others)}" if others else ""
    parts = [f"# Evaluation of {first.name}", f"{_cases(first.cases)} of {patients} patients{against}. "
             f"Predictions: `{first.folder}`. Truth: `{evaluation.truth}`."]
    if lines := remarks(evaluation):
        parts += ["## Caveats", "\n".join(f"- {escaped(line)}" for line in lines)]
    parts += ["## All cases",
              _summary_table(evaluation, [record for record in records.summaries if record.grouping == ALL])]
    groupings = dict.fromkeys(record.grouping for record in records.summaries if record.grouping != ALL)
    for grouping in groupings:
        parts += [f"## By {escaped(grouping)}",
                  _summary_table(evaluation, [record for record in records.summaries if record.grouping == grouping]),
                  _gap_table(evaluation, [record for record in records.gaps if record.grouping == grouping])]
    for other in others:
        parts += [f"## {escaped(first.name)} minus {escaped(other.name)}",
                  _difference_table(evaluation, [record for record in records.differences
                                                 if record.against == other.name])]
    parts += ["## Definitions", LEGEND.format(tolerance=evaluation.tolerance, unit=evaluation.unit)]
    if others:
        count = sum(_is_shown(record.metric, evaluation) for record in records.differences)
        parts[-1] += "\n" + PAIRED.format(first=first.name, exact=EXACT_PATIENTS, flips=FLIPS, count=count)
    return "\n\n".join(part for part in parts if part) + "\n"


def metric_title(metric: str, unit: str) -> str:
    """Format the name of a metric of `SUMMARISED`, with its unit."""
    plain = PENALISED.get(metric, metric)
    words = {"dice": "Dice", "hd95_mm": f"HD95 ({unit})", "assd_mm": f"ASSD ({unit})", "nsd": "NSD"}[plain]
    return f"{words} with misses" if metric in PENALISED else words


def _is_shown(metric: str, evaluation: Evaluation) -> bool:
    """Whether a metric is reported: distances with misses only where a label is missed."""
    return metric in METRICS or any(bool(method.missed.any()) for method in evaluation.measured.methods)


def _summary_table(evaluation: Evaluation, summaries: Sequence[Summary]) -> str:
    metrics = [metric for metric in SUMMARISED if _is_shown(metric, evaluation)]
    by_row: dict[tuple[int, str], dict[str, dict[str, Summary]]] = {}
    for record in summaries:
        by_row.setdefault((record.label, record.group), {}).setdefault(record.method, {})[record.metric] = record
    rows = []
    for (label, group), by_method in by_row.items():
        for method, cells in by_method.items():
            some = cells["dice"]
            rows.append([evaluation.label_name(label), group, method, f"{some.cases} ({some.patients})",
                         *(_with_interval(metric, cells[metric].mean, cells[metric]) for metric in metrics),
                         str(some.one_empty), str(some.both_empty)])
    titles = [metric_title(metric, evaluation.unit) for metric in metrics]
    return markdown_table(["label", "group", "method", "cases (patients)", *titles, "missed", "in neither"], rows)


def _gap_table(evaluation: Evaluation, gaps: Sequence[Gap]) -> str:
    """Format one row per label and method: gap, worst group and its mean, best group and its mean."""
    metrics = [metric for metric in SUMMARISED if _is_shown(metric, evaluation)]
    by_row: dict[tuple[int, str], dict[str, str]] = {}
    for record in gaps:
        worst, best = (f"{group} {_number(record.metric, mean)}"
                       for group, mean in ((record.worst, record.worst_mean), (record.best, record.best_mean)))
        by_row.setdefault((record.label, record.method), {})[record.metric] = (
            f"{_with_interval(record.metric, record.gap, record)}: worst {worst}, best {best}")
    rows = [[evaluation.label_name(label), method, *(cells.get(metric, "none") for metric in metrics)]
            for (label, method), cells in sorted(by_row.items(), key=lambda item: item[0][0])]
    titles = [f"gap in {metric_title(metric, evaluation.unit)}" for metric in metrics]
    return markdown_table(["label", "method", *titles], rows) if rows else ""


def _difference_table(evaluation: Evaluation, differences: Sequence[Difference]) -> str:
    metrics = [metric for metric in SUMMARISED if _is_shown(metric, evaluation)]
    by_row: dict[tuple[int, str], dict[str, Difference]] = {}
    for record in differences:
        by_row.setdefault((record.label, _group(record)), {})[record.metric] = record
    rows = []
    for (label, group), cells in sorted(by_row.items(), key=lambda item: item[0][0]):
        most = max(cells.values(), key=lambda record: record.left_out)
        rows.append([evaluation.label_name(label), group, f"{cells['dice'].cases} ({cells['dice'].patients})",
                     *(_difference(cells[metric]) for metric in metrics), str(most.left_out)])
    titles = [metric_title(metric, evaluation.unit) for metric in metrics]
    return markdown_table(["label", "group", "cases (patients)", *titles, "left out"], rows)


def _difference(record: Difference) -> str:
    text = _with_interval(record.metric, record.difference, record, signed=True)
    # with one patient the p value is always 1
    return text if math.isnan(record.low) else f"{text}, p {record.p_value:.2g}"


def _group(record: Difference) -> str:
    return record.group if record.grouping == ALL else f"{record.grouping}: {record.group}"


def _with_interval(metric: str, value: float, record: Summary | Gap | Difference, signed: bool = False) -> str:
    if math.isnan(value):
        return "none"
    if math.isnan(record.low):
        return _number(metric, value, signed)
    mean, low, high = (_number(metric, number, signed) for number in (value, record.low, record.high))
    return f"{mean} [{low}, {high}]"


def _number(metric: str, value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.{DIGITS.get(metric, 2)}f}"


def short_summary(evaluation: Evaluation) -> list[str]:
    """One line per method and label for the terminal: means over all cases."""
    means: dict[tuple[str, int], dict[str, float]] = {}
    for record in evaluation.records.summaries:
        if record.grouping == ALL:
            means.setdefault((record.method, record.label), {})[record.metric] = record.mean
    return [f"{method}, label {evaluation.label_name(label)}: "
            + ", ".join(f"{metric_title(metric, evaluation.unit)} {_number(metric, values[metric])}"
                        for metric in METRICS)
            for (method, label), values in means.items()]
