"""Readers of the files that nnU-Net writes into a fold's folder.

No checkpoint is loaded, since unpickling one can run arbitrary code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.lenient_json import read_json_object

FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"
VALIDATION, SUMMARY = "validation", "summary.json"
EXPECTED = "nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_F"

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?): ?(.*)")
_NUMBER = r"-?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
_EPOCH = re.compile(r"Epoch (\d{1,9})")
#: Beginnings of nnU-Net's log lines about an epoch -> name of the value.
_VALUES = {"Current learning rate:": "learning_rate", "train_loss": "train_loss", "val_loss": "val_loss",
           "Pseudo dice": "pseudo_dice", "Epoch time:": "seconds"}


@dataclass(frozen=True)
class FoldPlace:
    """A fold's folder and the names in its path.

    Attributes:
        folder: absolute path.
        dataset, trainer, plans, configuration, fold: names in the path.
    """

    folder: Path
    dataset: str
    trainer: str
    plans: str
    configuration: str
    fold: str

    @property
    def short(self) -> str:
        """The identifying part of the path, which reveals nothing else when a report is shared."""
        return "/".join(self.folder.parts[-3:])


@dataclass(frozen=True)
class TrainingRecord:
    """nnU-Net's own training according to its text logs.

    Attributes:
        epochs: one entry per epoch, in order: ``epoch`` and, where logged, learning_rate, train_loss, val_loss,
            pseudo_dice (mean over the labels) and seconds.
        started, ended: times of the first and the last log line; None without a log.
        dice: "Mean Validation Dice" of the final validation; None if it was not reached.
        planned: number of epochs according to nnU-Net's debug.json; None if unknown.
        torch, device: torch version and device according to debug.json; "" if unknown.
    """

    epochs: tuple[dict[str, float], ...] = ()
    started: datetime | None = None
    ended: datetime | None = None
    dice: float | None = None
    planned: int | None = None
    torch: str = ""
    device: str = ""


def locate_fold(folder: Path) -> FoldPlace:
    """Parse the path of a fold's folder.

    Raises:
        UserError: the folder does not exist or is not a fold's; the fix names folds below it.
    """
    from nnunetv2.utilities.file_path_utilities import convert_identifier_to_trainer_plans_config

    place = folder.resolve()
    if not place.is_dir():
        found = "is a file" if place.is_file() else "does not exist"
        raise UserError(f"{folder} {found}, expected the folder of a fold, {EXPECTED}", "correct the path")
    parts = convert_identifier_to_trainer_plans_config(str(place.parent))
    if not place.name.startswith("fold_") or len(parts) != 3:
        folds = sorted(str(path.relative_to(place)) for depth in ("fold_*", "*/fold_*", "*/*/fold_*")
                       for path in place.glob(depth) if path.is_dir())
        found = listed(folds or sorted(path.name for path in place.iterdir()), 4) or "nothing"
        raise UserError(f"{folder} is not the folder of a fold, expected {EXPECTED}; it holds {found}",
                        "name one of these folds" if folds else "correct the path")
    trainer, plans, configuration = parts
    return FoldPlace(place, place.parent.parent.name, trainer, plans, configuration, place.name.removeprefix("fold_"))


def read_training(folder: Path, problems: list[str]) -> TrainingRecord:
    """Read the text logs of a fold, one per start of the training.

    A log that begins at epoch k replaces the entries of earlier logs from epoch k on.

    Args:
        folder: folder of the fold.
        problems: list to which a message for each unreadable file is added.
    """
    record = _from_debug_file(read_json_object(folder / "debug.json", problems))
    logs = []
    for file in sorted(folder.glob("training_log_*.txt")):
        try:
            logs.append(list(_stamped(file.read_text(encoding="utf-8", errors="replace"))))
        except OSError as error:
            problems.append(f"{file.name} cannot be read ({error.strerror})")
    # file names do not sort by time: months and days have no leading zeros
    logs = sorted((lines for lines in logs if lines), key=lambda lines: lines[0][0])
    if not logs:
        return record
    epochs: dict[int, dict[str, float]] = {}
    for lines in logs:
        later = _epochs(lines)
        epochs = {number: line for number, line in epochs.items() if number < min(later, default=number + 1)} | later
    dice = [found for _, words in logs[-1] if (found := _first_number(words, "Mean Validation Dice:")) is not None]
    return replace(record, epochs=tuple(epochs[number] for number in sorted(epochs)), started=logs[0][0][0],
                   ended=logs[-1][-1][0], dice=dice[-1] if dice else None)


def _from_debug_file(content: Mapping[str, Any]) -> TrainingRecord:
    """Read debug.json, in which nnU-Net writes every attribute of its trainer as text."""
    planned, torch, device = (str(content.get(key, "")) for key in ("num_epochs", "torch_version", "device"))
    epochs = int(planned) if re.fullmatch(r"\d{1,7}", planned) else None
    return TrainingRecord(planned=epochs, torch=torch, device=device)


def _stamped(text: str) -> Iterator[tuple[datetime, str]]:
    """Yield time and text of the lines that begin with a time."""
    for line in text.splitlines():
        if found := _STAMP.match(line):
            try:
                yield datetime.fromisoformat(found[1]), found[2].strip()
            except ValueError:
                continue


def _epochs(lines: Sequence[tuple[datetime, str]]) -> dict[int, dict[str, float]]:
    epochs: dict[int, dict[str, float]] = {}
    line: dict[str, float] = {}
    for _, words in lines:
        if begun := _EPOCH.fullmatch(words):
            line = epochs[int(begun[1])] = {"epoch": float(begun[1])}
        for beginning, name in _VALUES.items():
            if words.startswith(beginning) and line:
                numbers = _numbers(words.removeprefix(beginning))
                line |= {name: sum(numbers) / len(numbers)} if numbers else {}
    # the last epoch may have been interrupted before its losses were logged
    return {number: line for number, line in epochs.items() if "train_loss" in line or "val_loss" in line}


def _numbers(words: str) -> list[float]:
    """The numbers in texts such as "[np.float32(0.5), nan]", "0.5" and "1.25 s"."""
    inner = re.sub(r"np\.float\d+\(", " ", words)
    return [float(number) for number in re.findall(rf"(?<![\w.]){_NUMBER}(?![\w.])", inner)]


def _first_number(words: str, beginning: str) -> float | None:
    numbers = _numbers(words.removeprefix(beginning)) if words.startswith(beginning) else []
    return numbers[0] if numbers else None


def validation_masks(folder: Path) -> dict[str, Path]:
    """Case -> mask predicted by nnU-Net's final validation."""
    from nnunet_cfcl.nnunet.label_files import case_of

    masks = folder / VALIDATION
    if not masks.is_dir():
        return {}
    found = {case_of(file.name): file for file in sorted(masks.iterdir()) if file.is_file()}
    return {case: file for case, file in found.items() if case is not None}


def raw_folder(dataset: str) -> Path | None:
    """Folder of the raw dataset in nnUNet_raw; None if it does not exist."""
    from nnunetv2.paths import nnUNet_raw

    return _below(nnUNet_raw, dataset)


def truth_folder(dataset: str) -> Path | None:
    """Folder of a dataset's ground-truth masks: nnU-Net's copy, else the raw dataset's; None if neither exists."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    kept = _below(nnUNet_preprocessed, f"{dataset}/gt_segmentations")
    return kept or _below(nnUNet_raw, f"{dataset}/labelsTr")


def _below(root: Any, name: str) -> Path | None:
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None
