"""Synthetic folders of folds, as trainings write them, and a parser of the report's HTML."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.gate.results import AttributeMetrics, GateReport, InterventionMetrics, Verdict
from nnunet_cfcl.files.hashing import digest

DATASET = "Dataset901_Made"
CASES = tuple(f"case_{number}" for number in range(10))
GROUPS = ("north", "south")


def write_picture(file: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    Image.fromarray(random.integers(0, 255, (size[1], size[0], channels), np.uint8), mode).save(file, "PNG")
    return file


def _write_mask(file: Path, shift: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[8 + shift:20 + shift, 8:20] = 1
    Image.fromarray(mask).save(file)


def write_dataset(root: Path, groups: Sequence[str] = GROUPS, dataset: str = DATASET) -> None:
    """Write the true masks to nnUNet_preprocessed and the attributes to nnUNet_raw."""
    preprocessed, raw = (root / f"nnUNet_{name}" / dataset for name in ("preprocessed", "raw"))
    raw.mkdir(parents=True)
    for case in CASES:
        _write_mask(preprocessed / "gt_segmentations" / f"{case}.png", 0)
    (preprocessed / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}}))
    with open(raw / "attributes.csv", "w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["case", "site", "age"])
        table.writerows([case, groups[number % len(groups)], 20.5 + number] for number, case in enumerate(CASES))


def fold_folder(root: Path, trainer: str = "nnUNetTrainerDVDCL", dataset: str = DATASET, configuration: str = "2d",
                fold: str = "0") -> Path:
    folder = root / "nnUNet_results" / dataset / f"{trainer}__nnUNetPlans__{configuration}" / f"fold_{fold}"
    folder.mkdir(parents=True)
    return folder


def write_config(fold: Path, changes: Mapping[str, Any] | None = None, **more: Any) -> None:
    """Write cfcl/config.json; ``changes`` are section -> key -> value."""
    settings = Settings().to_dict()
    for section, values in (changes or {}).items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    content = {"method": "DVD-CL", "settings": settings, "settings_hash": digest(settings),
               "pretraining": {"counterfactuals": {"source": "acquisition"}}, "pretraining_hash": "abcdefabcdef",
               "pretraining_folder": "", **more}
    (fold / "cfcl").mkdir(exist_ok=True)
    (fold / "cfcl" / "config.json").write_text(json.dumps(content))


def write_pretraining(fold: Path, epochs: int = 4, finished: bool = True) -> Path:
    folder = fold / "cfcl" / "pretraining"
    folder.mkdir(parents=True)
    lines = [{"epoch": epoch, "loss": 9 - epoch, "uninformed": 10.0, "alignment": 1 / (1 + epoch), "uniformity": -2.0,
              "positives": 1.0, "learning_rate": 1e-3, "gradient_norm": 2.0, "seconds": 90.0}
             for epoch in range(epochs)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_picture(folder / "views.png")
    if finished:
        (folder / "checkpoint_final.pth").write_bytes(b"")
    return folder


def training_log(epochs: Sequence[int], day: int = 1, done: bool = True) -> str:
    """Format a log as nnU-Net 2 writes it with NumPy 2."""
    begun = f"2026-05-0{day} 10:00:00.5:"
    lines = [f"{begun}  ", f"{begun} Pretraining epoch 0: loss 9.0000, 10 s "]
    for epoch in epochs:
        stamp = f"2026-05-0{day} 10:{epoch + 1:02d}:00.25:"
        lines += [f"{stamp} Epoch {epoch} ", f"{stamp} Current learning rate: 0.00{9 - epoch} ",
                  f"{stamp} train_loss {0.5 - epoch / 10 - day / 1000:.4f} ",
                  f"{stamp} val_loss {0.6 - epoch / 10:.4f} ",
                  f"{stamp} Pseudo dice [np.float32(0.{epoch}), np.float32(0.{epoch + 2}), nan] ",
                  f"{stamp} Epoch time: 12.5 s "]
    if done:
        lines += [f"2026-05-0{day} 11:00:00.1: Training done. ",
                  f"2026-05-0{day} 11:05:00.1: Mean Validation Dice:  0.75 "]
    return "\n".join(lines) + "\n"


def write_training(fold: Path, epochs: int = 3) -> None:
    (fold / "training_log_2026_5_1_10_00_00.txt").write_text(training_log(range(epochs)))
    (fold / "debug.json").write_text(json.dumps({"num_epochs": str(epochs), "torch_version": "2.9.0", "device": "cpu"}))
    (fold / "checkpoint_final.pth").write_bytes(b"")


def write_validation(fold: Path, error: int = 1, cases: Sequence[str] = CASES) -> None:
    """Write masks shifted by ``error`` pixels, or one less, in turns."""
    for number, case in enumerate(cases):
        _write_mask(fold / "validation" / f"{case}.png", error - number % 2)
        write_picture(fold / "validation" / "chromap" / f"{case}.png")
    summary = {"foreground_mean": {"Dice": 0.75}, "mean": {"1": {"Dice": 0.75}}}
    (fold / "validation" / "summary.json").write_text(json.dumps(summary))


def write_gate(fold: Path, name: str = "scanner", reason: str = "the way back does not lead to the original") -> None:
    figures = [InterventionMetrics(one, 20, 10, (AttributeMetrics(one, 0.9, 0.95, 0.5),), reversibility=0.1,
                                   structure=0.8, distance_before=2.0, distance_after=1.0) for one in (name, "disease")]
    report = GateReport(tuple(figures), (Verdict(True), Verdict(False, (reason,))), 0.01, 0.2, {name: 0.95}, 20, 10, 40,
                        {"enabled": True, "effectiveness": 0.8}, 0)
    folder = fold / "cfcl" / "generator" / "report"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report.to_json()))
    write_picture(folder / "contact_sheet.png")
    write_picture(folder / "figures.png")


def write_probe(fold: Path, model: str = "trained", image_set: str = "aaaa") -> None:
    entry = {"model": model, "image_set": image_set,
             "figures": {"probe_dice": {"mean": 0.5, "low": 0.4, "high": 0.6, "by_chance": None}},
             "probe_dice": {"1": {"name": "organ", "mean": 0.25, "low": None, "high": None}},
             "meaning": {"probe_dice": {"title": "linear probe Dice", "words": "Dice of a linear classifier."}}}
    folder = fold / "cfcl" / "probe"
    folder.mkdir(parents=True)
    (folder / "probe.json").write_text(json.dumps({"models": [entry], "remarks": ["the set is small"]}))
    write_picture(folder / "probe.png")


def write_complete(root: Path, trainer: str = "nnUNetTrainerDVDCL", error: int = 1, **place: str) -> Path:
    """Write a fold with all files."""
    fold = fold_folder(root, trainer, **place)
    write_config(fold, {"pretrain": {"epochs": 4}})
    write_pretraining(fold)
    write_training(fold)
    write_validation(fold, error)
    write_gate(fold)
    write_probe(fold)
    return fold


class Page(HTMLParser):
    """Parsed page: elements with their attributes, and the text of every section."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._section, self._skips = "", False
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), "an attribute occurs twice"
        self.elements.append((tag, attributes))
        self._skips = tag in ("style", "script")
        if tag == "section":
            self._section = str(attributes["id"])

    def handle_endtag(self, tag: str) -> None:
        self._skips = False
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if not self._skips:
            plain = data.replace("\N{NO-BREAK SPACE}", " ")
            self.texts[self._section] = self.texts.get(self._section, "") + plain

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """List the attributes of every element with a tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, section: str = "") -> str:
        """Text of a section, or of the whole page."""
        return " ".join((self.texts[section] if section else " ".join(self.texts.values())).split())
