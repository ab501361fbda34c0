"""How the pretraining goes: one JSON line and one picture per epoch, and a word when the embeddings collapse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_cfcl.atomic import replace_atomically, write_text_atomically

CURVES = (
    ("loss", "contrastive loss"),
    ("learning_rate", "learning rate"),
    ("alignment", "alignment (0: views agree)"),
    ("uniformity", "uniformity (0: collapsed)"),
    ("positives", "anchors with a positive"),
    ("gradient_norm", "gradient norm before clipping"),
    ("images_per_second", "images per second"),
)
COLLAPSED_UNIFORMITY = -0.05
UNINFORMED_MARGIN = 0.02


class Monitor:
    """Keeps ``log.jsonl`` and ``progress.png`` in a folder.

    Args:
        folder: where both files lie.
        first_epoch: lines of this epoch and later, left by a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, first_epoch: int = 0) -> None:
        self._log, self._picture = folder / "log.jsonl", folder / "progress.png"
        self.epochs = [line for line in read_log(self._log) if line["epoch"] < first_epoch]
        write_text_atomically(self._log, "".join(json.dumps(line) + "\n" for line in self.epochs))

    def end_epoch(
        self, epoch: int, steps: Sequence[Mapping[str, float]], seconds: float, images: int
    ) -> dict[str, float]:
        """Average the steps' statistics, write the line and the picture, return the line."""
        means = {key: _mean([step[key] for step in steps]) for key in steps[0]}
        line = {"epoch": epoch, **means, "seconds": seconds, "images_per_second": images / seconds}
        self.epochs.append(line)
        with open(self._log, "a") as file:
            file.write(json.dumps(line) + "\n")
        replace_atomically(self._picture, lambda file: plot_progress(self.epochs, file))
        return line


def collapse_warning(line: Mapping[str, float]) -> str | None:
    """In words, when the embeddings of an epoch carry no information; None when all is well."""
    uninformed = 2 * math.log(max(line["candidates"], 1))
    if line["uniformity"] > COLLAPSED_UNIFORMITY:
        return (
            f"WARNING: the embeddings have collapsed: uniformity {line['uniformity']:.3f} (0 means that all points "
            "have the same embedding). Lower pretrain.initial_lr or pretrain.temperature, and look at the views"
        )
    if line["loss"] > uninformed - UNINFORMED_MARGIN:
        return (
            f"WARNING: the loss {line['loss']:.3f} is no better than guessing (2 log N = {uninformed:.3f}): "
            "corresponding points are not told from others. Lower pretrain.initial_lr or weaken the views"
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
    """One panel per curve of `CURVES` over the epochs, as PNG."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4).flat
    numbers = [line["epoch"] for line in epochs]
    for panel, (key, title) in zip(panels, CURVES, strict=False):
        panel.plot(numbers, [line[key] for line in epochs], marker="." if len(epochs) < 50 else None)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("epoch", fontsize=8)
        panel.grid(alpha=0.3)
    list(figure.axes)[len(CURVES)].set_axis_off()
    figure.savefig(file, dpi=90, format="png")


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
