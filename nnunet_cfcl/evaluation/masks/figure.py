"""Plot of an evaluation: every case by group and method, and the paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from nnunet_cfcl.evaluation.masks.measure import MethodMetrics
from nnunet_cfcl.evaluation.masks.metrics import METRICS
from nnunet_cfcl.evaluation.masks.report import Evaluation, metric_title
from nnunet_cfcl.evaluation.masks.summary import Difference, Groupings, Summary, less_is_better
from nnunet_cfcl.evaluation.masks.tables import ALL, CROSS
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.figure_text import names_as_they_are

FIGURE = "metrics.png"
#: Most labels, and most differences, in the plot; the tables have all.
LABELS_SHOWN, DIFFERENCES_SHOWN = 5, 30
# palette of Okabe and Ito, which is safe for colour blindness
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
#: Width of a column of points in inches.
INCHES = 0.17
#: Characters of a title per inch of a panel.
CHARACTERS = 12
#: Fewest cases with a box of quartiles.
BOX_CASES = 5


@names_as_they_are
def draw(file: Path, evaluation: Evaluation, groupings: Groupings) -> None:
    """Draw a row of panels per label and one of paired differences, and write it atomically.

    Args:
        file: PNG.
        evaluation: results to plot.
        groupings: groups from `CaseAttributes.groupings`; combinations of columns are not drawn.
    """
    labels = _shown_labels(evaluation)
    places = [(grouping, group) for grouping, groups in groupings.items() if CROSS not in grouping for group in groups]
    lines = _shown_differences(evaluation, labels)
    heights = [3.0] * len(labels) + ([0.8 + 0.2 * len(lines)] if lines else [])
    methods = len(evaluation.measured.methods)
    width = max(3.4, 0.8 + INCHES * len(places) * (1 + methods))
    figure = Figure(figsize=(len(METRICS) * width + (1.5 if lines else 0.3), sum(heights) + 0.8),
                    layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(heights), len(METRICS), squeeze=False, height_ratios=heights)
    for row, label in zip(rows, labels):
        for axes, metric in zip(row, METRICS):
            _distributions(axes, evaluation, groupings, places, label, metric)
        row[0].set_ylabel(f"label {evaluation.label_name(label)}", fontsize=10)
    if lines:
        for axes, metric in zip(rows[-1], METRICS):
            _differences(axes, evaluation, lines, metric, int(CHARACTERS * width))
        rows[-1][0].set_yticks(range(len(lines)), [_line_name(evaluation, *line) for line in lines], fontsize=8)
    figure.legend(handles=_handles(evaluation), loc="outside upper center", ncols=methods + 2, fontsize=9,
                  frameon=False)
    if len(labels) < (count := len(evaluation.measured.methods[0].labels)):
        figure.supxlabel(f"the {len(labels)} of {count} labels with the lowest Dice; the tables list all", fontsize=9)
    replace_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))


def _shown_labels(evaluation: Evaluation) -> list[int]:
    """Choose the labels with the lowest mean Dice of the first method, in ascending order."""
    first = evaluation.measured.methods[0].name
    means = {record.label: record.mean for record in evaluation.records.summaries
             if record.grouping == ALL and record.metric == "dice" and record.method == first}
    return sorted(sorted(means, key=lambda label: np.nan_to_num(means[label], nan=2.0))[:LABELS_SHOWN])


def _distributions(
    axes: Axes, evaluation: Evaluation, groupings: Groupings, places: Sequence[tuple[str, str]], label: int,
    metric: str,
) -> None:
    methods = evaluation.measured.methods
    means = {(record.method, record.grouping, record.group): record for record in evaluation.records.summaries
             if (record.label, record.metric) == (label, metric)}
    for number, (method, colour) in enumerate(zip(methods, _colours(len(methods)))):
        shift = (number - (len(methods) - 1) / 2) * 0.84 / len(methods)
        for place, (grouping, group) in enumerate(places):
            members = np.isin(method.cases, groupings[grouping][group])
            _cases_of_group(axes, method, members, label, metric, place + shift, 0.7 / len(methods), colour)
            _mean(axes, means[method.name, grouping, group], place + shift)
    for place in range(1, len(places)):
        if places[place][0] != places[place - 1][0]:
            axes.axvline(place - 0.5, color="#bbbbbb", linewidth=0.8)
    crowded = any(len(name) > 9 for place in places for name in place)
    between = " " if crowded else "\n"
    names = [group if grouping == ALL else grouping + between + group for grouping, group in places]
    axes.set_xticks(range(len(places)), names, fontsize=8)
    if crowded:
        # rotated, since horizontal labels would overlap
        for name in axes.get_xticklabels():
            name.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_title(f"{metric_title(metric, evaluation.unit)}, {_better(metric)}", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)


def _cases_of_group(
    axes: Axes, method: MethodMetrics, members: NDArray[np.bool_], label: int, metric: str, place: float, width: float,
    colour: str,
) -> None:
    column = method.labels.index(label)
    values = method.values[members, column, METRICS.index(metric)]
    # jitter by the golden ratio: reproducible, and neighbours do not overlap
    jitter = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * width
    known = np.isfinite(values)
    if known.sum() >= BOX_CASES:
        low, middle, high = np.quantile(values[known], [0.25, 0.5, 0.75])
        axes.fill_between([place - width / 2, place + width / 2], low, high, color=colour, alpha=0.18, linewidth=0)
        axes.hlines(middle, place - width / 2, place + width / 2, color=colour, linewidth=1.2)
    axes.scatter(place + jitter[known], values[known], s=10, color=colour, alpha=0.7, linewidth=0)
    missed = method.missed[members, column] & ~known
    # missed labels have no distance: drawn at the upper edge of the panel
    axes.scatter(place + jitter[missed], np.full(int(missed.sum()), 0.98), s=26, marker="^", color=colour,
                 edgecolor="black", linewidth=0.5, transform=axes.get_xaxis_transform(), clip_on=False, zorder=4)


def _mean(axes: Axes, record: Summary, place: float) -> None:
    if np.isfinite(record.mean):
        axes.plot(place, record.mean, "D", color="black", markersize=4, zorder=5)
    if np.isfinite(record.low):
        axes.plot([place, place], [record.low, record.high], color="black", linewidth=1.6, zorder=5)


def _shown_differences(evaluation: Evaluation, labels: Sequence[int]) -> list[tuple[str, int, str, str]]:
    """Choose the differences to draw as (other method, label, grouping, group), from bottom to top.

    Groups are left out where there are more than `DIFFERENCES_SHOWN`.
    """
    shown = [(record.against, record.label, record.grouping, record.group) for record in evaluation.records.differences
             if record.metric == METRICS[0] and record.label in labels and CROSS not in record.grouping]
    if len(shown) > DIFFERENCES_SHOWN:
        shown = [line for line in shown if line[2] == ALL][:DIFFERENCES_SHOWN]
    return sorted(shown, key=lambda line: (line[0], line[1]))[::-1]


def _line_name(evaluation: Evaluation, against: str, label: int, grouping: str, group: str) -> str:
    where = "all cases" if grouping == ALL else f"{grouping} {group}"
    return f"label {evaluation.label_name(label)}, {where}, vs {against}"


def _differences(
    axes: Axes, evaluation: Evaluation, lines: Sequence[tuple[str, int, str, str]], metric: str, characters: int,
) -> None:
    known: Mapping[tuple[str, int, str, str], Difference] = {
        (record.against, record.label, record.grouping, record.group): record
        for record in evaluation.records.differences if record.metric == metric}
    others = [method.name for method in evaluation.measured.methods]
    colours = dict(zip(others, _colours(len(others))))
    for place, line in enumerate(lines):
        record = known[line]
        axes.plot([record.low, record.high], [place, place], color=colours[line[0]], linewidth=2)
        axes.plot(record.difference, place, "o" if line[2] == ALL else "s", color=colours[line[0]], markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_yticks([])
    first = evaluation.measured.methods[0].name
    side = "left" if less_is_better(metric) else "right"
    title = (f"{metric_title(metric, evaluation.unit)}: paired difference", f"{side} of 0: {first} is better")
    axes.set_title("\n".join(fill(line, characters) for line in title), fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def _handles(evaluation: Evaluation) -> list[Line2D]:
    methods = evaluation.measured.methods
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=method.name)
               for method, colour in zip(methods, _colours(len(methods)))]
    handles.append(Line2D([], [], marker="D", color="black", markersize=4,
                          label="mean, 95 % interval over patients (box: quartiles of the cases)"))
    if any(bool(method.missed.any()) for method in methods):
        handles.append(Line2D([], [], marker="^", linestyle="", color="white", markeredgecolor="black",
                              label="missed: no distance"))
    return handles


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _better(metric: str) -> str:
    return "less is better" if less_is_better(metric) else "more is better"
