"""What nnU-Net leaves in the folder of a fold, read without loading a checkpoint (which could run anything)."""

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
#: How nnU-Net's lines about an epoch begin -> what they are about.
_FIGURES = {"Current learning rate:": "learning_rate", "train_loss": "train_loss", "val_loss": "val_loss",
            "Pseudo dice": "pseudo_dice", "Epoch time:": "seconds"}


@dataclass(frozen=True)
class FoldPlace:
    """Where a fold lies and what its path says.

    Attributes:
        folder: absolute.
        dataset, trainer, plans, configuration, fold: as the folders are called.
    """

    folder: Path
    dataset: str
    trainer: str
    plans: str
    configuration: str
    fold: str

    @property
    def short(self) -> str:
        """The part of the path that says what it is; a page that is handed around need not say more."""
        return "/".join(self.folder.parts[-3:])


@dataclass(frozen=True)
class TrainingRecord:
    """nnU-Net's own training as its text logs tell it.

    Attributes:
        epochs: a line per epoch, in order: ``epoch`` and those of learning_rate, train_loss, val_loss, pseudo_dice
            (mean over the labels) and seconds that the log has.
        started, ended: times of the first and the last line; None without a log.
        dice: "Mean Validation Dice" of the final validation; None where it was not reached.
        planned: epochs that it is to have, from nnU-Net's debug.json; None where that is not known.
        torch, device: what it ran on, as written there; "" where that is not known.
    """

    epochs: tuple[dict[str, float], ...] = ()
    started: datetime | None = None
    ended: datetime | None = None
    dice: float | None = None
    planned: int | None = None
    torch: str = ""
    device: str = ""


def locate_fold(folder: Path) -> FoldPlace:
    """What the path of a fold's folder says.

    Raises:
        UserError: it is no such folder; what was found, and which folds are near.
    """
    from nnunetv2.utilities.file_path_utilities import convert_identifier_to_trainer_plans_config

    place = folder.resolve()
    if not place.is_dir():
        raise UserError(f"{folder} is {'a file' if place.is_file() else 'not there'}, expected the folder of a fold, "
                        f"{EXPECTED}", "mend the path")
    parts = convert_identifier_to_trainer_plans_config(str(place.parent))
    if not place.name.startswith("fold_") or len(parts) != 3:
        near = sorted(str(one.relative_to(place)) for depth in ("fold_*", "*/fold_*", "*/*/fold_*")
                      for one in place.glob(depth) if one.is_dir())
        found = f"it holds {listed(near, 4)}: name one of them" if near else (
            f"it holds {listed(sorted(one.name for one in place.iterdir()), 4) or 'nothing'}")
        raise UserError(f"{folder} is no folder of a fold, expected {EXPECTED}", f"{found}")
    trainer, plans, configuration = parts
    return FoldPlace(place, place.parent.parent.name, trainer, plans, configuration, place.name.removeprefix("fold_"))


def read_training(folder: Path, problems: list[str]) -> TrainingRecord:
    """The text logs of a fold, one per start of the training.

    A log that begins at epoch k takes the place of what earlier ones say of epoch k and later.

    Args:
        folder: of the fold.
        problems: files that cannot be read are added.
    """
    record = _of_debug_file(read_json_object(folder / "debug.json", problems))
    logs = []
    for file in sorted(folder.glob("training_log_*.txt")):
        try:
            logs.append(list(_stamped(file.read_text(encoding="utf-8", errors="replace"))))
        except OSError as error:
            problems.append(f"{file.name} cannot be read ({error.strerror})")
    # their names are not in the order of time: months and days have no leading zeros
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


def _of_debug_file(content: Mapping[str, Any]) -> TrainingRecord:
    """nnU-Net writes every attribute of its trainer as text."""
    planned, torch, device = (str(content.get(key, "")) for key in ("num_epochs", "torch_version", "device"))
    epochs = int(planned) if re.fullmatch(r"\d{1,7}", planned) else None
    return TrainingRecord(planned=epochs, torch=torch, device=device)


def _stamped(text: str) -> Iterator[tuple[datetime, str]]:
    """The lines that begin with a time, and what they say."""
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
        for beginning, name in _FIGURES.items():
            if words.startswith(beginning) and line:
                numbers = _numbers(words.removeprefix(beginning))
                line |= {name: sum(numbers) / len(numbers)} if numbers else {}
    # the last one may have been killed before it had a figure
    return {number: line for number, line in epochs.items() if "train_loss" in line or "val_loss" in line}


def _numbers(words: str) -> list[float]:
    """Those of "[np.float32(0.5), nan]", of "0.5" and of "1.25 s"."""
    inner = re.sub(r"np\.float\d+\(", " ", words)
    return [float(one) for one in re.findall(rf"(?<![\w.]){_NUMBER}(?![\w.])", inner)]


def _first_number(words: str, beginning: str) -> float | None:
    numbers = _numbers(words.removeprefix(beginning)) if words.startswith(beginning) else []
    return numbers[0] if numbers else None


def validation_masks(folder: Path) -> dict[str, Path]:
    """Case -> mask that nnU-Net's final validation predicted for it."""
    from nnunet_cfcl.nnunet.label_files import case_of

    masks = folder / VALIDATION
    if not masks.is_dir():
        return {}
    found = {case_of(file.name): file for file in sorted(masks.iterdir()) if file.is_file()}
    return {case: file for case, file in found.items() if case is not None}


def raw_folder(dataset: str) -> Path | None:
    """The raw dataset, where nnUNet_raw says; None where it is not."""
    from nnunetv2.paths import nnUNet_raw

    return _below(nnUNet_raw, dataset)


def truth_folder(dataset: str) -> Path | None:
    """True masks of a dataset: those that nnU-Net's validation used, else the raw dataset's; None without any."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    kept = _below(nnUNet_preprocessed, f"{dataset}/gt_segmentations")
    return kept or _below(nnUNet_raw, f"{dataset}/labelsTr")


def _below(root: Any, name: str) -> Path | None:
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None
