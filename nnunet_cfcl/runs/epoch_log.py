"""How a run goes: one JSON line and one picture per epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nnunet_cfcl.atomic import replace_atomically, write_text_atomically


class EpochLog:
    """Keeps ``log.jsonl`` and ``progress.png`` in a folder.

    Args:
        folder: where both files lie, made if it is missing; None: nothing is written.
        first_epoch: lines of this epoch and later, left by a run that was killed, are dropped.
        plot: draws all lines into a PNG file.
    """

    def __init__(
        self, folder: Path | None, first_epoch: int, plot: Callable[[Sequence[Mapping[str, float]], Path], object]
    ) -> None:
        self._folder, self._plot, self.epochs = folder, plot, list[dict[str, float]]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.epochs = [line for line in read_log(folder / "log.jsonl") if line["epoch"] < first_epoch]
            text = "".join(json.dumps(line) + "\n" for line in self.epochs)
            write_text_atomically(folder / "log.jsonl", text)

    def end_epoch(
        self, epoch: int, steps: Sequence[Mapping[str, float]], seconds: float, images: int,
        more: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Average the steps' statistics, write the line and the picture, return the line.

        Args:
            more: numbers of the whole epoch, such as those of a validation.
        """
        means = {key: _mean([step[key] for step in steps]) for key in steps[0]}
        line = {"epoch": epoch, **means, **(more or {}), "seconds": seconds, "images_per_second": images / seconds}
        self.epochs.append(line)
        if self._folder is not None:
            with open(self._folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            replace_atomically(self._folder / "progress.png", lambda file: self._plot(self.epochs, file))
        return line


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


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
