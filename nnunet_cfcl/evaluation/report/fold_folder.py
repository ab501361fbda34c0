"""Content of a fold's folder as plain data; missing or broken files are listed as problems and raise no error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_cfcl.config import settings_keys
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.lenient_json import as_list, as_number, as_object, read_json_lines, read_json_object
from nnunet_cfcl.nnunet.fold_files import (
    FINAL,
    SUMMARY,
    VALIDATION,
    FoldPlace,
    TrainingRecord,
    locate_fold,
    read_training,
    validation_masks,
)


@dataclass(frozen=True)
class FoldFolder:
    """Files of a fold.

    Attributes:
        place: location of the fold.
        config: content of ``cfcl/config.json``; empty without the file.
        pretraining_folder: folder of phase 1, which may not exist.
        pretraining: lines of its ``log.jsonl``.
        training: record of nnU-Net's training.
        gate: ``report.json`` of the generator's gate; empty without the file.
        probe: content of ``probe.json``; empty without the file.
        validation: case -> predicted mask.
        nnunet_summary: nnU-Net's ``validation/summary.json``; empty without the file.
        problems: descriptions of files that cannot be read.
    """

    place: FoldPlace
    config: Mapping[str, Any]
    pretraining_folder: Path
    pretraining: Sequence[Mapping[str, Any]]
    training: TrainingRecord
    gate: Mapping[str, Any]
    probe: Mapping[str, Any]
    validation: Mapping[str, Path]
    nnunet_summary: Mapping[str, Any]
    problems: Sequence[str]

    @property
    def own(self) -> Path:
        """Folder of the plugin in the fold."""
        return self.place.folder / "cfcl"

    @property
    def gate_folder(self) -> Path:
        """Folder of the gate's report, which may not exist."""
        return self.own / "generator" / "report"

    @property
    def probe_folder(self) -> Path:
        """Folder of the probe's results, which may not exist."""
        return self.own / "probe"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings as dotted key -> value."""
        return flat(as_object(self.config.get("settings")))

    @property
    def source(self) -> str:
        """Recorded source of the counterfactuals; "" without a record."""
        written = as_object(as_object(self.config.get("pretraining")).get("counterfactuals")).get("source")
        return written if isinstance(written, str) else ""

    @property
    def hash_is_right(self) -> bool | None:
        """Whether the recorded hash matches the settings; None without a hash."""
        found = self.config.get("settings_hash")
        return None if not found else digest(self.config.get("settings")) == found

    @property
    def is_trained(self) -> bool:
        """Whether nnU-Net's training is finished."""
        return (self.place.folder / FINAL).is_file()

    @property
    def is_pretrained(self) -> bool:
        """Whether phase 1 is finished."""
        return (self.pretraining_folder / FINAL).is_file()


def read_fold(folder: Path) -> FoldFolder:
    """Read a fold's folder without loading checkpoints.

    Raises:
        UserError: the folder is not that of a fold, see `locate_fold`.
    """
    place, problems = locate_fold(folder), list[str]()
    own = place.folder / "cfcl"
    config = read_json_object(own / "config.json", problems)
    pretraining_folder = _pretraining_folder(place, config)
    return FoldFolder(
        place, config, pretraining_folder, read_json_lines(pretraining_folder / "log.jsonl", problems),
        read_training(place.folder, problems), read_json_object(own / "generator" / "report" / "report.json", problems),
        read_json_object(own / "probe" / "probe.json", problems), validation_masks(place.folder),
        read_json_object(place.folder / VALIDATION / SUMMARY, problems), tuple(problems))


def _pretraining_folder(place: FoldPlace, config: Mapping[str, Any]) -> Path:
    """Locate the pretraining of the fold, or the one shared by all folds; folders may have moved since the record."""
    usual = place.folder / "cfcl" / "pretraining"
    recorded = config.get("pretraining_folder")
    name = Path(recorded).name if isinstance(recorded, str) else ""
    shared = place.folder.parent / name
    return shared if name.startswith("cfcl_pool_") and shared.is_dir() and not usual.is_dir() else usual


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten {"seed": 0, "pretrain": {"epochs": 1}} to {"seed": 0, "pretrain.epochs": 1}."""
    return {name: value for section, part in nested.items() for name, value in (
        [(f"{section}.{key}", value) for key, value in part.items()] if isinstance(part, dict) else [(section, part)])}


@dataclass(frozen=True)
class SettingRow:
    """Setting of a fold.

    Attributes:
        key: dotted key.
        value: recorded value, JSON.
        default: default value, JSON; None for a key that this version does not know.
        meaning: description.
        known: whether this version knows the key.
    """

    key: str
    value: Any
    default: Any
    meaning: str
    known: bool

    @property
    def differs(self) -> bool:
        """Whether the value is not the default; unknown keys have no default."""
        return not self.known or self.value != self.default


def setting_rows(fold: FoldFolder) -> list[SettingRow]:
    """List all settings of a fold in the order of the reference, unknown keys last."""
    known = {key: (list(default) if isinstance(default, tuple) else default, meaning)
             for key, default, meaning in settings_keys()}
    found = fold.settings
    rows = [SettingRow(key, found[key], *known[key], True) for key in known if key in found]
    return rows + [SettingRow(key, value, None, "unknown to this version", False)
                   for key, value in found.items() if key not in known]


def nnunet_dice(fold: FoldFolder) -> dict[str, float]:
    """Read label, or "foreground mean" -> Dice from nnU-Net's summary; NaN where it has no value."""
    summary = fold.nnunet_summary
    found = {label: as_number(as_object(metrics).get("Dice"))
             for label, metrics in as_object(summary.get("mean")).items()}
    mean = as_number(as_object(summary.get("foreground_mean")).get("Dice"))
    return {"foreground mean": mean, **found} if found or mean == mean else {}


def probe_models(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the models of a ``probe.json``."""
    return [model for model in as_list(content.get("models")) if isinstance(model, dict)]
