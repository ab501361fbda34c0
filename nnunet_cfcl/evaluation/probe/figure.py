"""Plot of a probe: a panel per metric, a bar per model, every case and the interval over patients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nnunet_cfcl.evaluation.masks.figure import COLOURS
from nnunet_cfcl.evaluation.probe.report import ProbeResult
from nnunet_cfcl.evaluation.probe.results import Estimate
from nnunet_cfcl.evaluation.statistics import Numbers
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.figure_text import names_as_they_are

FIGURE = "probe.png"
#: Most classes whose Dice is drawn; the table has all.
CLASSES_SHOWN = 8
#: Number of panels side by side.
COLUMNS = 3


@names_as_they_are
def draw(file: Path, result: ProbeResult) -> None:
    """Draw the plot and write it atomically.

    Args:
        file: PNG.
        result: result of a probe.
    """
    count = len(result.names) + 1
    rows = -(-count // COLUMNS)
    models = len(result.models)
    width = max(3.6, 1.4 + 0.3 * models * min(CLASSES_SHOWN, len(result.probe.labels)))
    figure = Figure(figsize=(COLUMNS * width, 3.0 * rows + 0.7), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, name in zip(panels, result.names):
        _metric_panel(axes, result, name)
    _dice_panel(panels[len(result.names)], result)
    for axes in panels[count:]:
        axes.set_axis_off()
    figure.legend(handles=_handles(result), loc="outside upper center", ncols=min(4, models + 1), fontsize=9,
                  frameon=False)
    replace_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))


def _metric_panel(axes: Axes, result: ProbeResult, name: str) -> None:
    for place, model in enumerate(result.models):
        _bar(axes, place, 0.7, model.estimates[name], model.values.get(name), _colour(place))
    metric = result.description(name)
    axes.set_xticks([])
    _finish(axes, f"{metric.title}, {'more' if metric.more_is_better else 'less'} is better")


def _dice_panel(axes: Axes, result: ProbeResult) -> None:
    """Draw the classes with the lowest Dice of the first model, in the order of their labels."""
    first, width = result.models[0].dice_estimates, 0.8 / len(result.models)
    lowest = sorted(first, key=lambda label: np.nan_to_num(first[label].mean, nan=2.0))[:CLASSES_SHOWN]
    shown = sorted(lowest)
    for number, model in enumerate(result.models):
        for place, label in enumerate(shown):
            shift = (number - (len(result.models) - 1) / 2) * width
            _bar(axes, place + shift, 0.9 * width, model.dice_estimates[label], model.dice[label], _colour(number))
    names = axes.set_xticks(range(len(shown)), [result.label_names.get(label) or str(label) for label in shown],
                            fontsize=8)
    if len(shown) > 3:
        for tick in names:
            tick.label1.set(rotation=30, ha="right", rotation_mode="anchor")
    _finish(axes, "linear probe Dice per class" + (
        "" if len(shown) == len(first) else f", the lowest {len(shown)} of {len(first)}"))


def _bar(axes: Axes, place: float, width: float, estimate: Estimate, values: Numbers | None, colour: str) -> None:
    if not np.isfinite(estimate.mean):
        return
    axes.bar(place, estimate.mean, width, color=colour, alpha=0.45, linewidth=0)
    if values is not None:
        # jitter by the golden ratio: reproducible, and neighbours do not overlap
        jitter = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.7 * width
        axes.scatter(place + jitter, values, s=9, color=colour, alpha=0.8, linewidth=0, zorder=3)
    if np.isfinite(estimate.low):
        axes.plot([place, place], [estimate.low, estimate.high], color="black", linewidth=1.8, zorder=4)
    if estimate.by_chance is not None and np.isfinite(estimate.by_chance):
        axes.plot([place - width / 2, place + width / 2], [estimate.by_chance] * 2, color="black", linestyle=":",
                  linewidth=1.4, zorder=4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(result: ProbeResult) -> Sequence[Line2D]:
    handles = [Line2D([], [], marker="s", linestyle="", color=_colour(number), label=model.name)
               for number, model in enumerate(result.models)]
    handles.append(Line2D([], [], color="black", linewidth=1.8, label="95 % interval over patients (points: cases)"))
    if any(one.by_chance is not None for model in result.models for one in model.estimates.values()):
        handles.append(Line2D([], [], color="black", linestyle=":", label="by chance"))
    return handles


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
