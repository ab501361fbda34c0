"""The masks of a fold's validation, measured by `nnunet_cfcl evaluate` and kept, as tables of the page."""

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
from nnunet_cfcl.evaluation.masks.evaluate import evaluate
from nnunet_cfcl.evaluation.masks.figure import FIGURE
from nnunet_cfcl.evaluation.masks.metrics import METRICS
from nnunet_cfcl.evaluation.masks.report import DIGITS, FEW_PATIENTS, NUMBERS, metric_title
from nnunet_cfcl.evaluation.masks.tables import ALL, CROSS
from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Cell,
    Fold,
    Note,
    Table,
    figure_text,
    interval_of,
    pictures,
    table,
)
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.lenient_json import as_list, as_number, as_object, read_json_object
from nnunet_cfcl.nnunet.fold_files import VALIDATION, raw_folder, truth_folder

#: Of the columns that are grouped by without being named: how many, and how many values each may have.
MOST_COLUMNS, MOST_VALUES = 3, 8
#: The evaluation's picture has small letters, and takes little room.
FIGURE_WIDTH = 1600
CAPTION = "Mean [95 % interval over patients]"
#: Beside the evaluation's files: what it was made from.
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Metrics:
    """An evaluation's ``metrics.json``.

    Attributes:
        folder: where it lies.
        content: the whole of it.
        remarks: what a reader must know first.
    """

    folder: Path
    content: Mapping[str, Any]
    remarks: tuple[str, ...] = ()

    def records(self, kind: str, **wanted: str) -> list[Mapping[str, Any]]:
        """Those of "summaries", "gaps" or "differences" with these values."""
        return [one for one in as_list(self.content.get(kind)) if isinstance(one, dict)
                and all(one.get(key) == value for key, value in wanted.items())]

    @property
    def unit(self) -> str:
        """Of distances."""
        return str(as_object(self.content.get("settings")).get("unit", "mm"))

    @property
    def methods(self) -> list[str]:
        """Names, in the order of the file."""
        return list(dict.fromkeys(str(one.get("method")) for one in self.records("summaries")))

    def label(self, record: Mapping[str, Any]) -> str:
        """Number and name of a record's label."""
        label = str(record.get("label"))
        name = as_object(as_object(self.content.get("settings")).get("label_names")).get(label)
        return f"{label} ({name})" if name else label


def evaluate_folds(
    folds: Mapping[str, FoldFolder], out: Path, by: Sequence[str] | None, processes: int
) -> Metrics:
    """Measure the validation masks of folds, the first compared with all others; what was measured before is read.

    Args:
        folds: name of the method -> its fold, all of one dataset.
        out: folder to write to.
        by: columns of attributes.csv to group by; None: `automatic_columns`.
        processes: cases at the same time.

    Raises:
        UserError: there is no truth, or what `evaluate` raises.
    """
    first = next(iter(folds.values()))
    truth = truth_folder(first.place.dataset)
    if truth is None:
        raise UserError(f"the true masks of {first.place.dataset} are neither in nnUNet_preprocessed "
                        "(gt_segmentations) nor in nnUNet_raw (labelsTr)", "set these variables as for the training")
    attributes, columns, remarks = _grouping(first.place.dataset, sorted(first.validation), by)
    masks = {name: {case: _state(file) for case, file in fold.validation.items()} for name, fold in folds.items()}
    inputs = digest({"masks": masks, "truth": {file.name: _state(file) for file in sorted(truth.iterdir())},
                     "attributes": _state(attributes) if attributes else None, "by": list(columns),
                     "version": nnunet_cfcl.__version__})
    if read_json_object(out / INPUTS, []).get("inputs") != inputs or not (out / NUMBERS).is_file():
        named = [f"{name}={fold.place.folder / VALIDATION}" for name, fold in folds.items()]
        evaluate(named[0], truth, out, attributes, columns, named[1:], processes=processes, say=lambda line: None)
        write_text_atomically(out / INPUTS, json.dumps({"inputs": inputs}))
    seen = [name for name, fold in folds.items() if fold.place.folder.name == "fold_all"]
    own = [f"fold all was trained with these very cases: the figures of {listed(seen)} say nothing about others"]
    return read_metrics(out, (*(own if seen else ()), *remarks))


def read_metrics(folder: Path, remarks: Sequence[str] = ()) -> Metrics:
    """An evaluation from its folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    problems: list[str] = []
    content = read_json_object(folder / NUMBERS, problems)
    if not as_list(content.get("summaries")):
        raise UserError(f"{folder} holds no evaluation ({listed(problems) or f'no figures in {NUMBERS}'})",
                        "`nnunet_cfcl evaluate -o` writes one")
    small = dict.fromkeys(
        f"{one.get('group')} ({one.get('grouping')})" for one in as_list(content["summaries"])
        if isinstance(one, dict) and 0 < as_number(one.get("patients")) < FEW_PATIENTS
        and one.get("metric") == "dice" and CROSS not in str(one.get("grouping")))
    few = [f"fewer than {FEW_PATIENTS} patients, whose intervals are hardly more than a guess: {listed(small, 6)}"]
    return Metrics(folder, content, (*remarks, *(few if small else ())))


def automatic_columns(raw: Path, cases: Sequence[str]) -> tuple[str, ...]:
    """The first binary or categorical columns of attributes.csv, as the pretraining sees them, with few values.

    Raises:
        UserError: the table, or the kinds that are declared for it, cannot be read.
    """
    attributes = read_attribute_table(raw)
    if attributes is None:
        return ()
    coding, _ = infer_attributes(attributes.attributes, cases, read_declared_kinds(raw))
    few = [one.name for one in coding.attributes if one.kind != "continuous" and len(one.values) <= MOST_VALUES]
    return tuple(few[:MOST_COLUMNS])


def _grouping(
    dataset: str, cases: Sequence[str], by: Sequence[str] | None
) -> tuple[Path | None, Sequence[str], tuple[str, ...]]:
    """The table, its columns to group by, and why there are none."""
    raw = raw_folder(dataset)
    file = raw / ATTRIBUTES if raw is not None else None
    if raw is None or file is None or not file.is_file():
        return None, by or (), ("there is no attributes.csv in the raw dataset, so that cases are not grouped",)
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
    """A name for each fold that is as short as the others allow: its trainer, with plans and fold where they differ."""
    places = [fold.place for fold in folds]
    several_plans, several_folds = (len({getattr(one, key) for one in places}) > 1 for key in ("plans", "fold"))
    named: dict[str, FoldFolder] = {}
    for fold, place in zip(folds, places):
        parts = [place.trainer, *([place.plans] if several_plans else []),
                 *([f"fold {place.fold}"] if several_folds else [])]
        # the name becomes part of a file's, and of a legend, which leaves out what begins with an underscore
        name = re.sub(r"[^\w .+()-]", "_", " ".join(parts)).lstrip("_ .+()-") or "trainer"
        taken = {other.casefold() for other in named}
        free = next(one for number in range(len(folds) + 1)
                    if (one := name if number == 0 else f"{name} ({number + 1})").casefold() not in taken)
        named[free] = fold
    return named


def dice_line(metrics: Metrics, method: str) -> str:
    """Mean Dice of every label, shortly."""
    found = metrics.records("summaries", method=method, grouping=ALL, metric="dice")
    return ", ".join(f"{metrics.label(one)} {figure_text(as_number(one.get('mean')))}" for one in found)


def mean_dice(metrics: Metrics, method: str) -> float:
    """Mean of the labels' mean Dice; NaN without any."""
    found = metrics.records("summaries", method=method, grouping=ALL, metric="dice")
    known = [mean for one in found if math.isfinite(mean := as_number(one.get("mean")))]
    return sum(known) / len(known) if known else math.nan


def metrics_blocks(metrics: Metrics, methods: Sequence[str], most_width: int) -> list[Block]:
    """Remarks, the table of all cases, those of the groups with their gaps, and the evaluation's picture, unless it is
    of more methods than these."""
    blocks: list[Block] = [Note(f"Mind: {line}.", "quiet") for line in metrics.remarks]
    blocks.append(_summary_table(metrics, methods, ALL, f"All cases: {CAPTION.lower()}"))
    groupings = dict.fromkeys(str(one.get("grouping")) for one in metrics.records("summaries"))
    for grouping in groupings:
        if grouping != ALL:
            inside: list[Block] = [_summary_table(metrics, methods, grouping, CAPTION)]
            inside += _gap_tables(metrics, methods, grouping)
            blocks.append(Fold(f"By {grouping}", inside, is_open=CROSS not in grouping))
    if list(methods) == metrics.methods:
        blocks += pictures(metrics.folder, [(
            FIGURE, "Every validation case by group, with means and intervals, for each label and metric",
            "Every case by group, with means and intervals over patients.")], max(most_width, FIGURE_WIDTH), wide=True)
    return blocks


def _shown(metrics: Metrics) -> dict[str, str]:
    """Metric -> its head."""
    return {metric: metric_title(metric, metrics.unit) for metric in METRICS}


def _summary_table(metrics: Metrics, methods: Sequence[str], grouping: str, caption: str) -> Table:
    rows: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for one in metrics.records("summaries", grouping=grouping):
        if one.get("method") in methods:
            key = metrics.label(one), str(one.get("group")), str(one.get("method"))
            rows.setdefault(key, {})[str(one.get("metric"))] = one
    # trainers below each other, which is how they are compared
    orders = [list(dict.fromkeys(parts)) for parts in zip(*rows)]
    ordered = sorted(rows, key=lambda key: [order.index(part) for order, part in zip(orders, key)])
    names = (True, grouping != ALL, len(methods) > 1)
    heads = [head for head, is_there in zip(("label", "group", "trainer"), names) if is_there]
    return table(caption, [*heads, "cases (patients)", *_shown(metrics).values(), "missed"], [
        [*(part for part, is_there in zip(key, names) if is_there), *_figures(rows[key], _shown(metrics))]
        for key in ordered])


def _figures(cells: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]) -> Iterator[str | Cell]:
    some = cells.get("dice", {})
    yield f"{some.get('cases', '?')} ({some.get('patients', '?')})"
    for metric in metrics:
        one = cells.get(metric, {})
        yield interval_of(one, "mean", DIGITS.get(metric, 2))
    missed = as_number(some.get("one_empty"))
    yield Cell("?" if math.isnan(missed) else f"{missed:.0f}", "bad" if missed > 0 else "")


def _gap_tables(metrics: Metrics, methods: Sequence[str], grouping: str) -> list[Block]:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in metrics.records("gaps", grouping=grouping):
        metric = str(one.get("metric"))
        if one.get("method") in methods and metric in METRICS:
            rows.setdefault((metrics.label(one), str(one.get("method"))), {})[metric] = (
                f"{interval_of(one, 'gap', DIGITS.get(metric, 2))}; worst {one.get('worst')}, best {one.get('best')}")
    if not rows:
        return []
    several = len(methods) > 1
    return [table("Gap between the means of the worst and the best group (0: none); both were chosen by looking",
                  ["label", *(["trainer"] if several else []), *_shown(metrics).values()],
                  [[label, *([method] if several else []), *(cells.get(metric, "none") for metric in METRICS)]
                   for (label, method), cells in sorted(rows.items(), key=lambda item: item[0][0])])]


def difference_blocks(metrics: Metrics) -> list[Block]:
    """The first method minus every other, case by case, of all cases."""
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for one in metrics.records("differences", grouping=ALL):
        rows.setdefault((str(one.get("against")), metrics.label(one)), {})[str(one.get("metric"))] = one
    if not rows:
        return []
    first = metrics.methods[0]
    cells = [[against, label, str(found.get("dice", {}).get("cases", "?")),
              *(_difference(found.get(metric, {}), metric) for metric in METRICS)]
             for (against, label), found in rows.items()]
    return [table(f"{first} minus each other trainer, case by case",
                  ["minus", "label", "cases", *_shown(metrics).values()], cells),
            Note(f"Above 0 {first} is better in Dice and NSD, below 0 in HD95 and ASSD. p: sign-flip test over "
                 "patients, corrected for no other comparison. Intervals are over patients; they do not say how "
                 "another seed of the training would have done.")]


def _difference(one: Mapping[str, Any], metric: str) -> str:
    p_value, text = as_number(one.get("p_value")), interval_of(one, "difference", DIGITS.get(metric, 2), "+")
    # with one patient every difference is as good as its opposite
    is_known = math.isfinite(p_value) and math.isfinite(as_number(one.get("low")))
    return f"{text}, p\N{NO-BREAK SPACE}{p_value:.2g}" if is_known else text
