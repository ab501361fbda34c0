"""The picture of a probe: a panel per figure, a bar per model, every case and the interval over patients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from nnunet_cfcl.evaluation.masks.figure import COLOURS
from nnunet_cfcl.evaluation.probe.bench import Figure
from nnunet_cfcl.evaluation.probe.report import Probed
from nnunet_cfcl.evaluation.statistics import Numbers
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.figure_text import names_as_they_are

FIGURE = "probe.png"
#: Classes whose Dice is drawn; the table has all.
CLASSES_SHOWN = 8
#: Panels side by side.
COLUMNS = 3


@names_as_they_are
def draw(file: Path, probed: Probed) -> None:
    """Draw the picture, atomically.

    Args:
        file: PNG.
        probed: to be drawn.
    """
    count = len(probed.names) + 1
    rows = -(-count // COLUMNS)
    models = len(probed.models)
    width = max(3.6, 1.4 + 0.3 * models * min(CLASSES_SHOWN, len(probed.bench.labels)))
    canvas = Canvas(figsize=(COLUMNS * width, 3.0 * rows + 0.7), layout="constrained", dpi=110)
    FigureCanvasAgg(canvas)
    panels = list(canvas.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, name in zip(panels, probed.names):
        _figure_panel(axes, probed, name)
    _dice_panel(panels[len(probed.names)], probed)
    for axes in panels[count:]:
        axes.set_axis_off()
    canvas.legend(handles=_handles(probed), loc="outside upper center", ncols=min(4, models + 1), fontsize=9,
                  frameon=False)
    replace_atomically(file, lambda temporary: canvas.savefig(temporary, format="png"))


def _figure_panel(axes: Axes, probed: Probed, name: str) -> None:
    for place, model in enumerate(probed.models):
        _bar(axes, place, 0.7, model.figures[name], model.values.get(name), _colour(place))
    meaning = probed.meaning(name)
    axes.set_xticks([])
    _finish(axes, f"{meaning.title}, {'more' if meaning.more_is_better else 'less'} is better")


def _dice_panel(axes: Axes, probed: Probed) -> None:
    """The classes with the lowest Dice of the first model, in the order of their labels."""
    first, width = probed.models[0].dice_figures, 0.8 / len(probed.models)
    lowest = sorted(first, key=lambda label: np.nan_to_num(first[label].mean, nan=2.0))[:CLASSES_SHOWN]
    shown = sorted(lowest)
    for number, model in enumerate(probed.models):
        for place, label in enumerate(shown):
            shift = (number - (len(probed.models) - 1) / 2) * width
            _bar(axes, place + shift, 0.9 * width, model.dice_figures[label], model.dice[label], _colour(number))
    names = axes.set_xticks(range(len(shown)), [probed.label_names.get(label) or str(label) for label in shown],
                            fontsize=8)
    if len(shown) > 3:
        for tick in names:
            tick.label1.set(rotation=30, ha="right", rotation_mode="anchor")
    _finish(axes, "linear probe Dice per class" + (
        "" if len(shown) == len(first) else f", the lowest {len(shown)} of {len(first)}"))


def _bar(axes: Axes, place: float, width: float, figure: Figure, values: Numbers | None, colour: str) -> None:
    if not np.isfinite(figure.mean):
        return
    axes.bar(place, figure.mean, width, color=colour, alpha=0.45, linewidth=0)
    if values is not None:
        # side by side, the same way every time
        spread = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.7 * width
        axes.scatter(place + spread, values, s=9, color=colour, alpha=0.8, linewidth=0, zorder=3)
    if np.isfinite(figure.low):
        axes.plot([place, place], [figure.low, figure.high], color="black", linewidth=1.8, zorder=4)
    if figure.by_chance is not None and np.isfinite(figure.by_chance):
        axes.plot([place - width / 2, place + width / 2], [figure.by_chance] * 2, color="black", linestyle=":",
                  linewidth=1.4, zorder=4)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(probed: Probed) -> Sequence[Line2D]:
    handles = [Line2D([], [], marker="s", linestyle="", color=_colour(number), label=model.name)
               for number, model in enumerate(probed.models)]
    handles.append(Line2D([], [], color="black", linewidth=1.8, label="95 % interval over patients (points: cases)"))
    if any(one.by_chance is not None for model in probed.models for one in model.figures.values()):
        handles.append(Line2D([], [], color="black", linestyle=":", label="by chance"))
    return handles


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
