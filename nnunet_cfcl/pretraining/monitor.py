"""Monitoring of the pretraining: a picture of its curves, and a warning of collapsed embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Key of a line of the log -> its name in reports and pictures.
TITLES = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "positives": "anchors with a positive",
    "temperature": "temperature",
    "gradient_norm": "gradient norm before clipping",
    "images_per_second": "images per second",
}
NOTES = {"alignment": " (0: positives agree)", "uniformity": " (0: collapsed)"}
#: Uniformity above which the embeddings count as collapsed, and how far below chance level a useful loss is.
COLLAPSED_UNIFORMITY = -0.05
UNINFORMED_MARGIN = 0.02


def collapse_warning(line: Mapping[str, float]) -> str | None:
    """Warning where the embeddings of an epoch carry no information; None where they do or it is not known."""
    if line.get("uniformity", -math.inf) > COLLAPSED_UNIFORMITY:
        return (
            f"WARNING: the embeddings have collapsed: uniformity {line['uniformity']:.3f} (0 means that all points "
            "have the same embedding). Lower pretrain.initial_lr or the temperature, and look at the views"
        )
    uninformed = line.get("uninformed", math.inf)
    if line["loss"] > uninformed - UNINFORMED_MARGIN:
        return (
            f"WARNING: the loss {line['loss']:.3f} is no better than guessing ({uninformed:.3f}): positives are not "
            "distinguished from negatives. Lower pretrain.initial_lr or weaken the views"
        )
    return None


def plot_progress(epochs: Sequence[Mapping[str, float]], file: Path) -> None:
    """Plot the curves of `TITLES` that the method has over the epochs, one panel each, as PNG."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4).flat
    numbers = [line["epoch"] for line in epochs]
    shown = [key for key in TITLES if any(key in line for line in epochs)]
    for panel, key in zip(panels, shown, strict=False):
        values = [line.get(key, math.nan) for line in epochs]
        panel.plot(numbers, values, marker="." if len(epochs) < 50 else None)
        panel.set_title(TITLES[key] + NOTES.get(key, ""), fontsize=10)
        panel.set_xlabel("epoch", fontsize=8)
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(shown):]:
        panel.set_axis_off()
    figure.savefig(file, dpi=90, format="png")
