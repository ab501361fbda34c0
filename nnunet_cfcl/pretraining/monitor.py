"""How the pretraining goes: one JSON line and one picture per epoch, and a word when the embeddings collapse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_cfcl.atomic import replace_atomically, write_text_atomically

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
COLLAPSED_UNIFORMITY = -0.05
UNINFORMED_MARGIN = 0.02


class Monitor:
    """Keeps ``log.jsonl`` and ``progress.png`` in a folder.

    Args:
        folder: where both files lie, made if it is missing; None: nothing is written.
        first_epoch: lines of this epoch and later, left by a run that was killed, are dropped.
    """

    def __init__(self, folder: Path | None, first_epoch: int = 0) -> None:
        self._folder, self.epochs = folder, list[dict[str, float]]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.epochs = [line for line in read_log(folder / "log.jsonl") if line["epoch"] < first_epoch]
            text = "".join(json.dumps(line) + "\n" for line in self.epochs)
            write_text_atomically(folder / "log.jsonl", text)

    def end_epoch(
        self, epoch: int, steps: Sequence[Mapping[str, float]], seconds: float, images: int
    ) -> dict[str, float]:
        """Average the steps' statistics, write the line and the picture, return the line."""
        means = {key: _mean([step[key] for step in steps]) for key in steps[0]}
        line = {"epoch": epoch, **means, "seconds": seconds, "images_per_second": images / seconds}
        self.epochs.append(line)
        if self._folder is not None:
            with open(self._folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            replace_atomically(self._folder / "progress.png", lambda file: plot_progress(self.epochs, file))
        return line


def collapse_warning(line: Mapping[str, float]) -> str | None:
    """In words, when the embeddings of an epoch carry no information; None when all is well or nothing is known."""
    if line.get("uniformity", -math.inf) > COLLAPSED_UNIFORMITY:
        return (
            f"WARNING: the embeddings have collapsed: uniformity {line['uniformity']:.3f} (0 means that all points "
            "have the same embedding). Lower pretrain.initial_lr or the temperature, and look at the views"
        )
    uninformed = line.get("uninformed", math.inf)
    if line["loss"] > uninformed - UNINFORMED_MARGIN:
        return (
            f"WARNING: the loss {line['loss']:.3f} is no better than guessing ({uninformed:.3f}): positives are not "
            "told from negatives. Lower pretrain.initial_lr or weaken the views"
        )
    return None


def read_log(file: Path) -> list[dict[str, float]]:
    """Lines of a ``log.jsonl``; a last line cut short by a kill is left out."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot_progress(epochs: Sequence[Mapping[str, float]], file: Path) -> None:
    """One panel per curve of `TITLES` that the method has, over the epochs, as PNG."""
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


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
