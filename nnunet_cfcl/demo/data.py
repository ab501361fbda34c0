"""Data of the demo: synthetic patients of two scanners, or the user's own dataset, and the images to test on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from PIL import Image

from nnunet_cfcl.demo.recipe import DemoSize
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.phantom.anatomy import LABELS
from nnunet_cfcl.phantom.dataset import FILE_ENDING, phantom_cases, quantise
from nnunet_cfcl.phantom.scanner import SCANNERS
from nnunet_cfcl.phantom.scm import render

GROUP = "scanner"
#: Test cases of an own dataset per scanner, or in all.
CASES_OF_OWN_DATA = 4
PHANTOM = "Dataset900_Phantom2D"
COUNTERFACTUALS = "counterfactuals"


@dataclass(frozen=True)
class HeldOut:
    """Images to predict, with their truth.

    Attributes:
        images, labels: their folders.
        groups: scanner -> its cases, the scanner of the labelled images first; one group without a name where the
            scanners are unknown.
        fold: fold to train, which none of these images belongs to.
        labelled: scanner of most labelled images; empty where the scanners are unknown.
    """

    images: Path
    labels: Path
    groups: Mapping[str, Sequence[str]]
    fold: str
    labelled: str


def write_phantom(raw: Path, size: DemoSize) -> Path:
    """Write labelled patients of scanner A, a pool of both scanners, and test patients as both scanners show them.

    The folder ``counterfactuals`` holds the labelled patients and the pool on the other scanner: the truth, which only
    a phantom has.

    Returns:
        The raw dataset.
    """
    folder, ending, shape = raw / PHANTOM, FILE_ENDING[2], (size.image, size.image)
    for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs", COUNTERFACTUALS):
        (folder / name).mkdir(parents=True)
    rows = []
    labelled = phantom_cases(size.labelled, 0, 2, shape, scanners=("A",))
    pool = phantom_cases(size.labelled + size.pool, 0, 2, shape)[size.labelled :]
    for case, part in [*((case, "Tr") for case in labelled), *((case, "Un") for case in pool)]:
        seen = case.attributes.scanner
        for scanner in SCANNERS:
            made = render(case.patient, scanner, case.attributes.disease)
            target = f"images{part}/{case.name}" if scanner == seen else f"{COUNTERFACTUALS}/{case.name}__scanner"
            Image.fromarray(quantise(made.image)).save(folder / f"{target}_0000{ending}")
            if scanner == seen and part == "Tr":
                Image.fromarray(made.mask).save(folder / "labelsTr" / f"{case.name}{ending}")
        rows.append((case.name, case.name, seen))
    for case in phantom_cases(size.test, 0, 2, shape, test=True):
        for scanner in SCANNERS:
            made = render(case.patient, scanner, case.attributes.disease)
            name = f"{case.name}_{scanner}"
            Image.fromarray(quantise(made.image)).save(folder / "imagesTs" / f"{name}_0000{ending}")
            Image.fromarray(made.mask).save(folder / "labelsTs" / f"{name}{ending}")
            rows.append((name, case.name, scanner))
    _write_table(folder / "attributes.csv", rows)
    description = {"channel_names": {"0": "phantom"}, "labels": LABELS, "numTraining": size.labelled,
                   "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))
    return folder


def shrink_plan(file: Path, size: DemoSize) -> None:
    """Change nnU-Net's plan of the phantom to a network that learns within minutes on one core."""
    plan = json.loads(file.read_text())
    configuration = plan["configurations"]["2d"]
    network = configuration["architecture"]["arch_kwargs"]
    count = network["n_stages"] = min(size.stages, network["n_stages"])
    for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
        network[key] = network[key][:count]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: count - 1]
    network["features_per_stage"] = [size.features * 2**stage for stage in range(count)]
    configuration["batch_size"] = size.batch
    file.write_text(json.dumps(plan, indent=1))


def check_raw(raw: Path) -> None:
    """Check that a folder is a raw dataset.

    Raises:
        UserError: it is none.
    """
    if not ((raw / "dataset.json").is_file() and re.match(r"Dataset\d{3}_", raw.resolve().name)):
        raise UserError(f"{raw} is not a raw dataset of nnU-Net, expected a folder DatasetXXX_Name with a dataset.json",
                        "correct the path after --raw")


def choose_held_out(dataset: Path, preprocessed: Path, out: Path, count: int | None) -> HeldOut:
    """Copy test cases that have labels, else the validation cases of fold 0, to folders of their own.

    Args:
        dataset: the raw dataset.
        preprocessed: nnU-Net's preprocessed dataset.
        out: folder of the demo.
        count: largest number per scanner; None: all.
    """
    ending = json.loads((dataset / "dataset.json").read_text())["file_ending"]
    cases, part, fold = _names(dataset / "imagesTs", ending), "Ts", "all"
    if not cases or not all((dataset / "labelsTs" / f"{case}{ending}").exists() for case in cases):
        cases, part, fold = _split(dataset, preprocessed)[0]["val"], "Tr", "0"
    scanners = _scanners(dataset)
    values = [scanners[case] for case in _names(dataset / "imagesTr", ending) if scanners.get(case)]
    labelled = max(sorted(set(values)), key=values.count) if values else ""
    known = labelled and all(scanners.get(case) for case in cases)
    groups: dict[str, list[str]] = {labelled: []} if known else {}
    for case in cases:
        groups.setdefault(scanners[case] if known else "", []).append(case)
    groups = {name: members[:count] for name, members in groups.items() if members}
    images, labels = out / "test_images", out / "test_labels"
    for folder in (images, labels):
        folder.mkdir()
    for case in (case for members in groups.values() for case in members):
        for image in (dataset / f"images{part}").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"):
            shutil.copy(image, images)
        shutil.copy(dataset / f"labels{part}" / f"{case}{ending}", labels)
    return HeldOut(images, labels, groups, fold, labelled if known else "")


def _names(folder: Path, ending: str) -> list[str]:
    return sorted({file.name[: -len(ending)].rpartition("_")[0] for file in folder.glob(f"*_[0-9]*{ending}")})


def _split(dataset: Path, preprocessed: Path) -> Any:
    """Read nnU-Net's split, or write it as nnU-Net does: of two trainings that begin together, one may read it half."""
    file = preprocessed / "splits_final.json"
    if not file.exists():
        description = json.loads((dataset / "dataset.json").read_text())
        cases = sorted(get_filenames_of_train_images_and_targets(str(dataset), description))
        write_text_atomically(file, json.dumps(generate_crossval_split(cases)))
    return json.loads(file.read_text())


def _scanners(dataset: Path) -> dict[str, str]:
    file = dataset / "attributes.csv"
    if not file.exists():
        return {}
    with open(file, newline="") as table:
        return {row["case"]: row.get(GROUP) or "" for row in csv.DictReader(table)}


def _write_table(file: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    with open(file, "w", newline="") as target:
        table = csv.writer(target, lineterminator="\n")
        table.writerows([("case", "patient", GROUP), *rows])
