"""How a run goes: one JSON line and one picture per epoch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nnunet_cfcl.errors import reason
from nnunet_cfcl.files.atomic import backup_path, replace_atomically, writable_folder, write_text_atomically
from nnunet_cfcl.files.lenient_json import json_object


class EpochLog:
    """Keeps ``log.jsonl`` and ``progress.png`` in a folder.

    Args:
        folder: where both files lie, made if it is missing; None: nothing is written.
        first_epoch: lines of this epoch and later, left by a run that was killed, are dropped.
        plot: draws all lines into a PNG file.
        say: told of a picture that cannot be drawn, and of an earlier log that is damaged, which is kept as
            ``damaged_log.jsonl``.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path | None, first_epoch: int, plot: Callable[[Sequence[Mapping[str, float]], Path], object],
        say: Callable[[str], object] = print,
    ) -> None:
        self._folder, self._plot, self._say, self.epochs = folder, plot, say, list[dict[str, float]]()
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
            more: numbers of the whole epoch, such as those of a validation.

        Raises:
            WriteError: the line cannot be written.
        """
        means = {key: _mean([step[key] for step in steps]) for key in steps[0]}
        line = {"epoch": epoch, **means, **(more or {}), "seconds": seconds, "images_per_second": images / seconds}
        self.epochs.append(line)
        if self._folder is not None:
            self._write(self._folder)
            picture = self._folder / "progress.png"
            with best_effort(picture, self._say):
                replace_atomically(picture, lambda file: self._plot(self.epochs, file))
        return line

    def _keep_damaged(self, file: Path, first_epoch: int) -> None:
        """Copy a log that holds more than could be read of it, and not all epochs before the first one."""
        if len(self.epochs) < first_epoch and len(lines := _texts(file)) > len(read_log(file)):
            kept = backup_path(file, "damaged")
            replace_atomically(kept, partial(shutil.copyfile, file))
            self._say(f"{file} is damaged in line {len(read_log(file)) + 1} of {len(lines)}: from there on it is left "
                      f"out of the log and its picture, and kept as {kept.name}")

    def _write(self, folder: Path) -> None:
        # whole: half a line, left by a full disk, would spoil the next one
        write_text_atomically(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in self.epochs))


@contextmanager
def best_effort(file: Path, say: Callable[[str], object], what: str = "picture") -> Iterator[None]:
    """Within the block a picture is drawn, or another file made that can be done without; where that fails, or the disk
    is full, ``say`` is told, and all goes on."""
    try:
        yield
    # whatever it is, it must not cost a training
    except Exception as error:
        say(f"No {what} {file} ({reason(error)}); all else goes on")


def read_log(file: Path) -> list[dict[str, float]]:
    """Lines of a ``log.jsonl`` up to the first that is none of an epoch; the last may be cut short by a kill."""
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
