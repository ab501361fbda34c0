"""Plot of the demo: images with truth and prediction, learning curves, views."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import NDArray

from nnunet_cfcl.runs.checkpoint import read_plain
from nnunet_cfcl.runs.epoch_log import read_log

CASES_SHOWN = 2


@dataclass(frozen=True)
class Example:
    """Folders with the results of one configuration.

    Attributes:
        configuration: name of the configuration.
        fold: folder of the trained fold.
        images: folder of the predicted images.
        labels: folder of their true labels.
        predictions: folder of the predictions.
    """

    configuration: str
    fold: Path
    images: Path
    labels: Path
    predictions: Path


def draw_demo(dataset: Path, examples: Sequence[Example], picture: Path) -> None:
    """Plot one band per configuration: truth and prediction of some cases, curves of both phases, views."""
    figure = Figure(figsize=(17, 7.2 * len(examples)), layout="constrained")
    FigureCanvasAgg(figure)
    bands = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
    for band, example in zip(bands, examples, strict=True):
        trainer = example.fold.parent.name.split("__")[0]
        band.suptitle(f"{dataset.name}, {example.configuration}, {trainer}", fontsize=13)
        left, right = band.subfigures(1, 2, width_ratios=[2.6, 1.6])
        _draw_results(left, dataset, example)
        axis = right.subplots()
        axis.imshow(imread(example.fold / "cfcl" / "pretraining" / "views.png"))
        axis.set_axis_off()
    figure.savefig(picture, dpi=80, format="png")


def _draw_results(figure: Any, dataset: Path, example: Example) -> None:
    axes = figure.subplots(2, 3)
    for row, case in enumerate(_cases(dataset, example)):
        image, truth, prediction, dice = _read(dataset, example, case)
        position = int(np.argmax((truth > 0).sum((1, 2))))
        for axis, mask, title in (
            (axes[row, 0], truth, f"{case}\n{_attributes(dataset, case)}truth"),
            (axes[row, 1], prediction, f"prediction, mean Dice {dice:.2f}"),
        ):
            axis.imshow(image[position], cmap="gray")
            shown = mask[position]
            for label in np.unique(shown[shown > 0]):
                axis.contour(shown == label, levels=[0.5], colors=[f"C{int(label)}"], linewidths=1.5)
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    _draw_curves(axes[0, 2], axes[1, 2], example.fold)


def _cases(dataset: Path, example: Example) -> list[str]:
    ending = json.loads((dataset / "dataset.json").read_text())["file_ending"]
    return sorted(file.name[: -len(ending)] for file in example.predictions.glob(f"*{ending}"))[:CASES_SHOWN]


def _attributes(dataset: Path, case: str) -> str:
    table = dataset / "attributes.csv"
    if not table.exists():
        return ""
    with open(table, newline="") as file:
        row = next((row for row in csv.DictReader(file) if row["case"] == case), {})
    shown = [f"{name} {value}, " for name, value in row.items() if name not in ("case", "patient")]
    return "".join(shown)


def _read(dataset: Path, example: Example, case: str) -> tuple[NDArray, NDArray, NDArray, float]:
    """Read image, truth and prediction (Z, Y, X) and compute the mean Dice, with nnU-Net's functions."""
    description = json.loads((dataset / "dataset.json").read_text())
    ending = description["file_ending"]
    channels = [str(file) for file in sorted(example.images.glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))]
    reader = determine_reader_writer_from_dataset_json(description, channels[0])()
    files = [str(folder / f"{case}{ending}") for folder in (example.labels, example.predictions)]
    truth, prediction = (reader.read_seg(file)[0][0] for file in files)
    labels = [int(label) for label in np.unique(truth) if label > 0]
    metrics = compute_metrics(files[0], files[1], reader, labels)["metrics"]
    return reader.read_images(channels)[0][0], truth, prediction, float(np.mean([metrics[k]["Dice"] for k in labels]))


def _draw_curves(upper: Any, lower: Any, fold: Path) -> None:
    epochs = read_log(fold / "cfcl" / "pretraining" / "log.jsonl")
    upper.plot([line["epoch"] for line in epochs], [line["loss"] for line in epochs], marker="o")
    upper.set_title("phase 1: contrastive loss", fontsize=9)
    # nnU-Net stores its curves only in the checkpoint
    curves = read_plain(fold / "checkpoint_final.pth", "checkpoint", "run the demo again")["logging"]
    lower.plot(curves["train_losses"], marker="o", label="training loss")
    lower.plot(curves["mean_fg_dice"], marker="o", label="pseudo Dice (validation)")
    lower.set_title("phase 2: fine-tuning", fontsize=9)
    lower.legend(fontsize=8)
    for axis in (upper, lower):
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
