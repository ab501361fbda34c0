"""Learning curves of pretraining and fine-tuning, of one fold or of several in the same panels, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder
from nnunet_cfcl.evaluation.report.pictures import Picture, data_uri
from nnunet_cfcl.files.lenient_json import as_number

# palette of Okabe and Ito, which is safe for colour blindness
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
#: Number of panels side by side, and width and height of a panel in inches.
COLUMNS, PANEL = 3, (3.7, 2.4)

#: Key of the pretraining's log -> title of the panel.
PRETRAINING = {
    "loss": "loss", "alignment": "alignment (0: positives agree)", "uniformity": "uniformity (0: collapsed)",
    "positives": "anchors with a positive", "gradient_norm": "gradient norm before clipping",
    "learning_rate": "learning rate", "temperature": "temperature",
}
#: Key of nnU-Net's log -> title of the panel.
TRAINING = {"pseudo_dice": "pseudo Dice, mean of the labels", "learning_rate": "learning rate"}
#: Keys of the pretraining's log that are compared between folds.
COMPARED = ("loss", "alignment", "uniformity")


@dataclass(frozen=True)
class Line:
    """Curve in a panel.

    Attributes:
        name: name in the legend; "" for none.
        epochs: x values.
        values: y values, as many; NaN where an epoch has none.
        colour: colour of matplotlib.
        dashed: whether the line is dashed.
    """

    name: str
    epochs: Sequence[float]
    values: Sequence[float]
    colour: str = COLOURS[0]
    dashed: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the curve has a finite value."""
        return any(math.isfinite(value) for value in self.values)


Panels = Mapping[str, Sequence[Line]]


def pretraining_curves(fold: FoldFolder) -> Picture | None:
    """Draw loss, alignment, uniformity and other metrics over the epochs of phase 1; None without a log."""
    panels = {title: [_line(fold.pretraining, key)] for key, title in PRETRAINING.items()}
    # the loss of identical embeddings
    panels["loss"] += [_line(fold.pretraining, "uninformed", "chance", "#888888", dashed=True)]
    return _drawn(panels, "Curves of the pretraining over its epochs: " + _names(panels))


def training_curves(fold: FoldFolder) -> Picture | None:
    """Draw losses, pseudo Dice and learning rate over the epochs of nnU-Net's training; None without a log."""
    epochs = fold.training.epochs
    losses = [_line(epochs, "train_loss", "training"), _line(epochs, "val_loss", "validation", COLOURS[1])]
    panels = {"nnU-Net's loss": losses, **{title: [_line(epochs, key)] for key, title in TRAINING.items()}}
    return _drawn(panels, "Curves of nnU-Net's training over its epochs: " + _names(panels))


def compared_curves(folds: Mapping[str, FoldFolder]) -> Picture | None:
    """Draw the main curves of several folds in the same panels; None without a log."""
    coloured = [(name, fold, COLOURS[number % len(COLOURS)]) for number, (name, fold) in enumerate(folds.items())]
    panels = {f"pretraining: {PRETRAINING[key]}": [
        _line(fold.pretraining, key, name, colour) for name, fold, colour in coloured] for key in COMPARED}
    for key, title in (("train_loss", "nnU-Net: training loss"), ("val_loss", "nnU-Net: validation loss"),
                       ("pseudo_dice", "nnU-Net: pseudo Dice")):
        panels[title] = [_line(fold.training.epochs, key, name, colour) for name, fold, colour in coloured]
    return _drawn(panels, "Curves of all folds in the same panels: " + _names(panels))


def _line(
    epochs: Sequence[Mapping[str, Any]], key: str, name: str = "", colour: str = COLOURS[0], dashed: bool = False
) -> Line:
    numbers = [as_number(line.get("epoch")) for line in epochs]
    return Line(name, numbers, [as_number(line.get(key)) for line in epochs], colour, dashed)


def _names(panels: Panels) -> str:
    return ", ".join(title for title, lines in panels.items() if any(line.is_known for line in lines))


def _drawn(panels: Panels, alt: str) -> Picture | None:
    shown = {title: known for title, lines in panels.items() if (known := [line for line in lines if line.is_known])}
    if not shown:
        return None
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL[0], rows * PANEL[1]), layout="constrained")
    FigureCanvasSVG(figure)
    places = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, (title, lines) in zip(places, shown.items()):
        _draw_panel(axes, title, lines)
    for axes in places[len(shown):]:
        axes.set_axis_off()
    width, height = (int(96 * inches) for inches in figure.get_size_inches())
    return Picture(data_uri("svg+xml", _svg(figure)), alt, "", width, height, wide=True)


def _draw_panel(axes: Axes, title: str, lines: Sequence[Line]) -> None:
    for line in lines:
        axes.plot(line.epochs, line.values, color=line.colour, linestyle="--" if line.dashed else "-", linewidth=1.4,
                  marker="." if len(line.values) < 50 and not line.dashed else None)
    named = {line.name: drawn for line, drawn in zip(lines, axes.get_lines()) if line.name}
    if named:
        legend = axes.legend(list(named.values()), list(named), fontsize=7, frameon=False)
        for text in legend.get_texts():
            # two dollar signs in a name are not a formula
            text.set_parse_math(False)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("epoch", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> bytes:
    buffer = BytesIO()
    # reproducible bytes
    with matplotlib.rc_context({"svg.hashsalt": "nnunet_cfcl"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()
