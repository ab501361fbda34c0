"""Log of a training: one JSON line per epoch, and a picture of the curves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from nnunet_cfcl.errors import best_effort
from nnunet_cfcl.files.atomic import backup_path, replace_atomically, writable_folder, write_text_atomically
from nnunet_cfcl.files.lenient_json import json_object


class EpochLog:
    """Writes ``log.jsonl`` and ``progress.png`` after every epoch.

    Args:
        folder: folder of both files, created if it is missing; None: nothing is written.
        first_epoch: first epoch of this run; lines of this epoch and later, left by a run that was killed, are dropped.
        plot: draws all lines into a PNG file.
        log: reports a picture that cannot be drawn, and a damaged earlier log, which is kept as ``damaged_log.jsonl``.

    Attributes:
        epochs: the lines of all epochs so far.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path | None, first_epoch: int, plot: Callable[[Sequence[Mapping[str, float]], Path], object],
        log: Callable[[str], object] = print,
    ) -> None:
        self._folder, self._plot, self._log, self.epochs = folder, plot, log, list[dict[str, float]]()
        if folder is not None:
            writable_folder(folder, "free some space there or make it writable, then start again, with --c")
            for unfinished in folder.glob("*.tmp"):  # of a run that was killed, and perhaps large
                unfinished.unlink()
            self.epochs = [line for line in read_log(folder / "log.jsonl") if line["epoch"] < first_epoch]
            self._keep_damaged(folder / "log.jsonl", first_epoch)
            self._write(folder)

    def end_epoch(
        self, epoch: int, steps: Sequence[Mapping[str, float]], seconds: float, images: int,
        more: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Average the steps' statistics, write the line and the picture, return the line.

        Args:
            epoch: number of the epoch, 0-based.
            steps: statistics of the steps, all with the same keys; values that are not finite are left out of a mean.
            seconds: duration of the epoch.
            images: number of images of the epoch.
            more: metrics of the whole epoch, such as those of a validation.

        Raises:
            WriteError: the line cannot be written.
        """
        means = {key: _mean([step[key] for step in steps]) for key in steps[0]}
        line = {"epoch": epoch, **means, **(more or {}), "seconds": seconds, "images_per_second": images / seconds}
        self.epochs.append(line)
        if self._folder is not None:
            self._write(self._folder)
            picture = self._folder / "progress.png"
            with best_effort(picture, self._log):
                replace_atomically(picture, lambda file: self._plot(self.epochs, file))
        return line

    def _keep_damaged(self, file: Path, first_epoch: int) -> None:
        """Back up a log that has lines which cannot be read, where epochs before the first one are missing."""
        if len(self.epochs) < first_epoch and len(lines := _texts(file)) > len(read_log(file)):
            kept = backup_path(file, "damaged")
            replace_atomically(kept, partial(shutil.copyfile, file))
            self._log(f"{file} is damaged in line {len(read_log(file)) + 1} of {len(lines)}: this line and all that "
                      f"follow are left out of the log and its picture; a copy of the file is kept as {kept.name}")

    def _write(self, folder: Path) -> None:
        # as a whole: part of a line, left by a full disk, would corrupt the next one
        write_text_atomically(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.epochs))


def read_log(file: Path) -> list[dict[str, float]]:
    """Lines of a ``log.jsonl`` up to the first that cannot be read; a kill may have cut the last one short."""
    lines = []
    for text in _texts(file):
        line = json_object(text)
        if line is None or "epoch" not in line or not all(isinstance(one, (int, float)) for one in line.values()):
            break
        lines.append(line)
    return lines


def _texts(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
