"""Metrics of a fold's validation masks, as tables of the page; results of the evaluation are reused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunet_cfcl
from nnunet_cfcl.data.attribute_table import ATTRIBUTES, read_attribute_table, read_declared_kinds
from nnunet_cfcl.data.attributes import infer_attributes
from nnunet_cfcl.errors import UserError, listed, reason
from nnunet_cfcl.evaluation.masks.figure import FIGURE
from nnunet_cfcl.evaluation.masks.metrics import METRICS
from nnunet_cfcl.evaluation.masks.report import DIGITS, FEW_PATIENTS, NUMBERS, metric_title
from nnunet_cfcl.evaluation.masks.run import evaluate
from nnunet_cfcl.evaluation.masks.tables import ALL, CROSS
from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Cell,
    Details,
    Note,
    Table,
    interval_of,
    metric_text,
    pictures,
    table,
)
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.lenient_json import as_list, as_number, as_object, read_json_object
from nnunet_cfcl.nnunet.fold_files import VALIDATION, raw_folder, truth_folder

#: Default columns to group by: their largest number, and the most values of each.
MOST_COLUMNS, MOST_VALUES = 3, 8
#: Least width of the evaluation's plot in pixels, since its text is small.
FIGURE_WIDTH = 1600
CAPTION = "Mean [95 % interval over patients]"
#: File with the digest of the evaluation's inputs.
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Metrics:
    """Content of a ``metrics.json``.

    Attributes:
        folder: folder of the file.
        content: content of the file.
        remarks: caveats for the reader.
    """

    folder: Path
    content: Mapping[str, Any]
    remarks: tuple[str, ...] = ()

    def records(self, kind: str, **wanted: str) -> list[Mapping[str, Any]]:
        """List the records of "summaries", "gaps" or "differences" with given values."""
        return [record for record in as_list(self.content.get(kind)) if isinstance(record, dict)
                and all(record.get(key) == value for key, value in wanted.items())]

    @property
    def unit(self) -> str:
        """Unit of distances."""
        return str(as_object(self.content.get("settings")).get("unit", "mm"))

    @property
    def methods(self) -> list[str]:
        """Names of the methods in the order of the file."""
        return list(dict.fromkeys(str(record.get("method")) for record in self.records("summaries")))

    def label(self, record: Mapping[str, Any]) -> str:
        """Number and name of the label of a record."""
        label = str(record.get("label"))
        name = as_object(as_object(self.content.get("settings")).get("label_names")).get(label)
        return f"{label} ({name})" if name else label


def evaluate_folds(
    folds: Mapping[str, FoldFolder], out: Path, by: Sequence[str] | None, processes: int
) -> Metrics:
    """Evaluate the validation masks of folds, and reuse the results of unchanged masks.

    Args:
        folds: name of the method -> fold, all of one dataset; the others are compared with the first.
        out: folder of the results.
        by: columns of attributes.csv to group by; None: `automatic_columns`.
        processes: number of worker processes.

    Raises:
        UserError: the true masks are missing, or `evaluate` rejects the input.
    """
    first = next(iter(folds.values()))
    truth = truth_folder(first.place.dataset)
    if truth is None:
        raise UserError(f"the true masks of {first.place.dataset} are neither in nnUNet_preprocessed "
                        "(gt_segmentations) nor in nnUNet_raw (labelsTr)",
                        "set these environment variables as for the training")
    attributes, columns, remarks = _grouping(first.place.dataset, sorted(first.validation), by)
    masks = {name: {case: _state(file) for case, file in fold.validation.items()} for name, fold in folds.items()}
    inputs = digest({"masks": masks, "truth": {file.name: _state(file) for file in sorted(truth.iterdir())},
                     "attributes": _state(attributes) if attributes else None, "by": list(columns),
                     "version": nnunet_cfcl.__version__})
    if read_json_object(out / INPUTS, []).get("inputs") != inputs or not (out / NUMBERS).is_file():
        named = [f"{name}={fold.place.folder / VALIDATION}" for name, fold in folds.items()]
        evaluate(named[0], truth, out, attributes, columns, named[1:], processes=processes, log=lambda line: None)
        write_text_atomically(out / INPUTS, json.dumps({"inputs": inputs}))
    trained = [name for name, fold in folds.items() if fold.place.folder.name == "fold_all"]
    own = [f"fold all was trained on these cases: the metrics of {listed(trained)} do not generalise to other cases"]
    return read_metrics(out, (*(own if trained else ()), *remarks))


def read_metrics(folder: Path, remarks: Sequence[str] = ()) -> Metrics:
    """Read the results of an evaluation.

    Raises:
        UserError: the folder has no results, or they cannot be read.
    """
    problems: list[str] = []
    content = read_json_object(folder / NUMBERS, problems)
    if not as_list(content.get("summaries")):
        raise UserError(f"{folder} holds no evaluation ({listed(problems) or f'no summaries in {NUMBERS}'})",
                        f"write them with nnunet_cfcl evaluate -o {folder}")
    small = dict.fromkeys(
        f"{record.get('group')} ({record.get('grouping')})" for record in as_list(content["summaries"])
        if isinstance(record, dict) and 0 < as_number(record.get("patients")) < FEW_PATIENTS
        and record.get("metric") == "dice" and CROSS not in str(record.get("grouping")))
    few = [f"groups of fewer than {FEW_PATIENTS} patients, with unreliable intervals: {listed(small, 6)}"]
    return Metrics(folder, content, (*remarks, *(few if small else ())))


def automatic_columns(raw: Path, cases: Sequence[str]) -> tuple[str, ...]:
    """Choose the first binary or categorical columns of attributes.csv with few values.

    Raises:
        UserError: the table, or the declared types of its columns, cannot be read.
    """
    attributes = read_attribute_table(raw)
    if attributes is None:
        return ()
    coding, _ = infer_attributes(attributes.attributes, cases, read_declared_kinds(raw))
    names = [attribute.name for attribute in coding.attributes
             if attribute.kind != "continuous" and len(attribute.values) <= MOST_VALUES]
    return tuple(names[:MOST_COLUMNS])


def _grouping(
    dataset: str, cases: Sequence[str], by: Sequence[str] | None
) -> tuple[Path | None, Sequence[str], tuple[str, ...]]:
    """Find the table and its columns to group by, or the reason why there are none."""
    raw = raw_folder(dataset)
    file = raw / ATTRIBUTES if raw is not None else None
    if raw is None or file is None or not file.is_file():
        return None, by or (), ("cases are not grouped: the raw dataset has no attributes.csv",)
    if by is not None:
        return file, by, ()
    try:
        return file, automatic_columns(raw, cases), ()
    except UserError as error:
        return None, (), (f"cases are not grouped: {reason(error)}",)


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def method_names(folds: Sequence[FoldFolder]) -> dict[str, FoldFolder]:
    """Name each fold by its trainer, with plans and fold where these differ, such that names are unique."""
    places = [fold.place for fold in folds]
    several_plans, several_folds = (len({getattr(place, key) for place in places}) > 1 for key in ("plans", "fold"))
    named: dict[str, FoldFolder] = {}
    for fold, place in zip(folds, places):
        parts = [place.trainer, *([place.plans] if several_plans else []),
                 *([f"fold {place.fold}"] if several_folds else [])]
        # the name becomes part of a file name, and of a legend, which skips names with a leading underscore
        name = re.sub(r"[^\w .+()-]", "_", " ".join(parts)).lstrip("_ .+()-") or "trainer"
        taken = {other.casefold() for other in named}
        free = next(candidate for number in range(len(folds) + 1)
                    if (candidate := name if number == 0 else f"{name} ({number + 1})").casefold() not in taken)
        named[free] = fold
    return named


def dice_line(metrics: Metrics, method: str) -> str:
    """Format the mean Dice of every label."""
    found = metrics.records("summaries", method=method, grouping=ALL, metric="dice")
    return ", ".join(f"{metrics.label(record)} {metric_text(as_number(record.get('mean')))}" for record in found)


def mean_dice(metrics: Metrics, method: str) -> float:
    """Mean over the labels of the mean Dice; NaN without labels."""
    found = metrics.records("summaries", method=method, grouping=ALL, metric="dice")
    known = [mean for record in found if math.isfinite(mean := as_number(record.get("mean")))]
    return sum(known) / len(known) if known else math.nan


def metrics_blocks(metrics: Metrics, methods: Sequence[str], most_width: int) -> list[Block]:
    """Build caveats, the table of all cases, those of the groups with their gaps, and the evaluation's plot.

    The plot is left out where it has more methods than ``methods``.
    """
    blocks: list[Block] = [Note(f"Caution: {line}.", "quiet") for line in metrics.remarks]
    blocks.append(_summary_table(metrics, methods, ALL, f"All cases: {CAPTION.lower()}"))
    groupings = dict.fromkeys(str(record.get("grouping")) for record in metrics.records("summaries"))
    for grouping in groupings:
        if grouping != ALL:
            inside: list[Block] = [_summary_table(metrics, methods, grouping, CAPTION)]
            inside += _gap_tables(metrics, methods, grouping)
            blocks.append(Details(f"By {grouping}", inside, is_open=CROSS not in grouping))
    if list(methods) == metrics.methods:
        blocks += pictures(metrics.folder, [(
            FIGURE, "Every validation case by group, with means and intervals, for each label and metric",
            "Every case by group, with means and intervals over patients.")], max(most_width, FIGURE_WIDTH), wide=True)
    return blocks


def _shown(metrics: Metrics) -> dict[str, str]:
    """Metric -> column head."""
    return {metric: metric_title(metric, metrics.unit) for metric in METRICS}


def _summary_table(metrics: Metrics, methods: Sequence[str], grouping: str, caption: str) -> Table:
    rows: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for record in metrics.records("summaries", grouping=grouping):
        if record.get("method") in methods:
            key = metrics.label(record), str(record.get("group")), str(record.get("method"))
            rows.setdefault(key, {})[str(record.get("metric"))] = record
    # by label, then by group, so that the trainers to compare are adjacent
    orders = [list(dict.fromkeys(parts)) for parts in zip(*rows)]
    ordered = sorted(rows, key=lambda key: [order.index(part) for order, part in zip(orders, key)])
    names = (True, grouping != ALL, len(methods) > 1)
    heads = [head for head, is_there in zip(("label", "group", "trainer"), names) if is_there]
    return table(caption, [*heads, "cases (patients)", *_shown(metrics).values(), "missed"], [
        [*(part for part, is_there in zip(key, names) if is_there), *_metric_cells(rows[key], _shown(metrics))]
        for key in ordered])


def _metric_cells(cells: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]) -> Iterator[str | Cell]:
    some = cells.get("dice", {})
    yield f"{some.get('cases', '?')} ({some.get('patients', '?')})"
    for metric in metrics:
        record = cells.get(metric, {})
        yield interval_of(record, "mean", DIGITS.get(metric, 2))
    missed = as_number(some.get("one_empty"))
    yield Cell("?" if math.isnan(missed) else f"{missed:.0f}", "bad" if missed > 0 else "")


def _gap_tables(metrics: Metrics, methods: Sequence[str], grouping: str) -> list[Block]:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in metrics.records("gaps", grouping=grouping):
        metric = str(record.get("metric"))
        if record.get("method") in methods and metric in METRICS:
            gap = interval_of(record, "gap", DIGITS.get(metric, 2))
            rows.setdefault((metrics.label(record), str(record.get("method"))), {})[metric] = (
                f"{gap}; worst {record.get('worst')}, best {record.get('best')}")
    if not rows:
        return []
    several = len(methods) > 1
    return [table("Gap between the means of the worst and the best group (0: none), chosen by their results",
                  ["label", *(["trainer"] if several else []), *_shown(metrics).values()],
                  [[label, *([method] if several else []), *(cells.get(metric, "none") for metric in METRICS)]
                   for (label, method), cells in sorted(rows.items(), key=lambda item: item[0][0])])]


def difference_blocks(metrics: Metrics) -> list[Block]:
    """Build the table of paired differences between the first method and every other, over all cases."""
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for record in metrics.records("differences", grouping=ALL):
        rows.setdefault((str(record.get("against")), metrics.label(record)), {})[str(record.get("metric"))] = record
    if not rows:
        return []
    first = metrics.methods[0]
    cells = [[against, label, str(found.get("dice", {}).get("cases", "?")),
              *(_difference(found.get(metric, {}), metric) for metric in METRICS)]
             for (against, label), found in rows.items()]
    return [table(f"{first} minus each other trainer, case by case",
                  ["minus", "label", "cases", *_shown(metrics).values()], cells),
            Note(f"{first} is better in Dice and NSD above 0, in HD95 and ASSD below 0. p: sign-flip test over "
                 "patients, not corrected for multiple comparisons. Intervals are over patients and do not cover "
                 "the variation between seeds of the training.")]


def _difference(record: Mapping[str, Any], metric: str) -> str:
    p_value, text = as_number(record.get("p_value")), interval_of(record, "difference", DIGITS.get(metric, 2), "+")
    # with one patient the p value is always 1
    is_known = math.isfinite(p_value) and math.isfinite(as_number(record.get("low")))
    return f"{text}, p\N{NO-BREAK SPACE}{p_value:.2g}" if is_known else text
