"""What lies in a fold's folder, read into plain data; whatever is missing or broken is named, and stops nothing."""

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
    """A fold.

    Attributes:
        place: where it lies.
        config: of ``cfcl/config.json``; empty without one.
        pretraining_folder: where phase 1's files are, or would be.
        pretraining: lines of its ``log.jsonl``.
        training: nnU-Net's own.
        gate: ``report.json`` of the generator's gate; empty without one.
        probe: ``probe.json``; empty without one.
        validation: case -> predicted mask.
        nnunet_summary: nnU-Net's ``validation/summary.json``; empty without one.
        problems: files that could not be read, in words.
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
        """The plugin's folder in it."""
        return self.place.folder / "cfcl"

    @property
    def gate_folder(self) -> Path:
        """Where the gate's report is, or would be."""
        return self.own / "generator" / "report"

    @property
    def probe_folder(self) -> Path:
        """Where the probe's files are, or would be."""
        return self.own / "probe"

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return flat(as_object(self.config.get("settings")))

    @property
    def source(self) -> str:
        """What gave the counterfactuals, as written down; "" where nothing was."""
        written = as_object(as_object(self.config.get("pretraining")).get("counterfactuals")).get("source")
        return written if isinstance(written, str) else ""

    @property
    def hash_is_right(self) -> bool | None:
        """Whether the settings' hash is that of the settings; None without one."""
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
    """Read a fold's folder; no checkpoint is loaded.

    Raises:
        UserError: it is no fold's folder, see `locate_fold`.
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
    """The fold's own, or one beside the folds that serves them all; folders may have moved since they were noted."""
    usual = place.folder / "cfcl" / "pretraining"
    noted = config.get("pretraining_folder")
    name = Path(noted).name if isinstance(noted, str) else ""
    shared = place.folder.parent / name
    return shared if name.startswith("cfcl_pool_") and shared.is_dir() and not usual.is_dir() else usual


def flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"seed": 0, "pretrain": {"epochs": 1}} as {"seed": 0, "pretrain.epochs": 1}."""
    return {name: value for section, part in nested.items() for name, value in (
        [(f"{section}.{key}", value) for key, value in part.items()] if isinstance(part, dict) else [(section, part)])}


@dataclass(frozen=True)
class SettingRow:
    """A setting of a fold.

    Attributes:
        key: dotted.
        value, default: JSON; default is None where this version does not know the key.
        meaning: in words.
        known: whether this version knows it.
    """

    key: str
    value: Any
    default: Any
    meaning: str
    known: bool

    @property
    def differs(self) -> bool:
        """Whether it is not the default; a key that is not known has none."""
        return not self.known or self.value != self.default


def setting_rows(fold: FoldFolder) -> list[SettingRow]:
    """All settings of a fold, in the order of their table, those that this version does not know last."""
    known = {key: (list(default) if isinstance(default, tuple) else default, meaning)
             for key, default, meaning in settings_keys()}
    found = fold.settings
    rows = [SettingRow(key, found[key], *known[key], True) for key in known if key in found]
    return rows + [SettingRow(key, value, None, "not known to this version", False)
                   for key, value in found.items() if key not in known]


def nnunet_dice(fold: FoldFolder) -> dict[str, float]:
    """Label, or "foreground mean" -> Dice of nnU-Net's own summary; NaN where it has no figure."""
    summary = fold.nnunet_summary
    found = {label: as_number(as_object(figures).get("Dice"))
             for label, figures in as_object(summary.get("mean")).items()}
    mean = as_number(as_object(summary.get("foreground_mean")).get("Dice"))
    return {"foreground mean": mean, **found} if found or mean == mean else {}


def probe_models(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The models of a ``probe.json``."""
    return [model for model in as_list(content.get("models")) if isinstance(model, dict)]
