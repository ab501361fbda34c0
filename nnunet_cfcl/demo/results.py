"""Results of the demo, read from the files that its commands wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from numpy.typing import NDArray
from PIL import Image

from nnunet_cfcl.chromap import read_rgb_volume
from nnunet_cfcl.demo.data import HeldOut
from nnunet_cfcl.demo.recipe import PLUGIN, STOCK, Recipe

#: Dice of the models: name of the model -> case -> label -> Dice.
Dice = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Shown:
    """Case of the picture; all arrays are (Y, X), the map (Y, X, 3) or None.

    Attributes:
        group: its scanner.
        image, truth: the image and its mask.
        masks: name of the model -> predicted mask.
        chromap: colours of the plugin's model.
        dice: name of the model -> mean Dice of the case.
    """

    group: str
    image: NDArray[Any]
    truth: NDArray[Any]
    masks: Mapping[str, NDArray[Any]]
    chromap: NDArray[np.uint8] | None
    dice: Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """All that the picture shows.

    Attributes:
        name: name of the dataset.
        own: whether it is the user's own.
        recipes: how the two models were trained.
        seconds: name of the model -> duration of its training.
        labels: value -> name of the labels.
        labelled, pool: number of labelled images, and of those of the pool.
        labelled_group: scanner of the labelled images; empty if unknown.
        dice: name of the model -> scanner -> mean Dice of its cases.
        cases: scanner -> number of test cases.
        shown: one case per scanner.
        in_3d: how the small model was trained in 3D; None: there is none.
    """

    name: str
    own: bool
    recipes: tuple[Recipe, Recipe]
    seconds: Mapping[str, float]
    labels: Mapping[int, str]
    labelled: int
    pool: int
    labelled_group: str
    dice: Mapping[str, Mapping[str, float]]
    cases: Mapping[str, int]
    shown: Sequence[Shown]
    in_3d: Recipe | None


def read_results(out: Path, dataset: Path, own: bool, held_out: HeldOut, recipes: tuple[Recipe, Recipe],
                 in_3d: Recipe | None, seconds: Mapping[str, float]) -> Results:
    """Read Dice, masks and maps.

    Args:
        out: folder of the demo.
        dataset: the raw dataset.
        own: whether it is the user's own.
        held_out: the test cases.
        recipes: how the models were trained.
        in_3d: how the small model was trained in 3D.
        seconds: name of the model -> duration of its training.
    """
    description = json.loads((dataset / "dataset.json").read_text())
    dice = {recipe.name: read_dice(out / "evaluation" / _table(recipe.name)) for recipe in recipes}
    means = {name: {group: float(np.mean([_mean(cases[case]) for case in members]))
                    for group, members in held_out.groups.items()} for name, cases in dice.items()}
    return Results(
        dataset.name, own, recipes, seconds,
        {value: name for name, value in description["labels"].items() if isinstance(value, int) and value > 0},
        description["numTraining"], _count(dataset / "imagesUn"), held_out.labelled, means,
        {group: len(members) for group, members in held_out.groups.items()},
        [_read_shown(out, description, held_out, group, case, dice) for group, case in _chosen(held_out)], in_3d)


def read_dice(file: Path) -> dict[str, dict[int, float]]:
    """Read case -> label -> Dice from a table of ``nnunet_cfcl evaluate``."""
    found: dict[str, dict[int, float]] = {}
    with open(file, newline="") as table:
        for row in csv.DictReader(table):
            found.setdefault(row["case"], {})[int(row["label"])] = float(row["dice"])
    return found


def _table(name: str) -> str:
    return "metrics.csv" if name == STOCK else f"metrics_{name}.csv"


def _mean(values: Mapping[int, float]) -> float:
    defined = [value for value in values.values() if not np.isnan(value)]
    return float(np.mean(defined)) if defined else 1.0


def _count(folder: Path) -> int:
    return len({file.name.rpartition("_")[0] for file in folder.glob("*_[0-9]*")})


def _chosen(held_out: HeldOut) -> list[tuple[str, str]]:
    """The first case of every scanner; two cases of the only one. A phantom is the same patient on both."""
    groups = held_out.groups
    if len(groups) == 1:
        return [(group, case) for group, members in groups.items() for case in members[:2]]
    return [(group, members[0]) for group, members in groups.items()][:2]


def _read_shown(out: Path, description: dict[str, Any], held_out: HeldOut, group: str, case: str, dice: Dice) -> Shown:
    """Read a case at the slice with the largest truth."""
    ending = description["file_ending"]
    channels = [str(file) for file in sorted(held_out.images.glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))]
    reader = determine_reader_writer_from_dataset_json(description, channels[0], verbose=False)()
    truth = reader.read_seg(str(held_out.labels / f"{case}{ending}"))[0][0]
    masks = {name: reader.read_seg(str(out / "predictions" / name / f"{case}{ending}"))[0][0] for name in dice}
    position = int(np.argmax((truth > 0).sum((1, 2))))
    colours = _read_map(out / "predictions" / PLUGIN / "chromap", case, truth.shape)
    return Shown(group, reader.read_images(channels)[0][0][position], truth[position],
                 {name: mask[position] for name, mask in masks.items()},
                 None if colours is None else colours[position], {name: _mean(dice[name][case]) for name in dice})


def _read_map(folder: Path, case: str, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Read the colours (Z, Y, X, 3), where they have the voxels of the image as nnU-Net reads it."""
    volume = folder / f"{case}.nii.gz"
    if volume.exists():
        colours = read_rgb_volume(volume)
    elif (folder / f"{case}.png").exists():
        colours = np.asarray(Image.open(folder / f"{case}.png").convert("RGB"))[None]
    else:
        return None
    return colours if colours.shape[:3] == shape else None
