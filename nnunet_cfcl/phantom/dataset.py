"""Write phantom patients as an nnU-Net raw dataset, with attributes and true counterfactuals.

    DatasetXXX_Name/dataset.json                     labels, channel, and under "phantom" the parameters of the cases
                    imagesTr/ labelsTr/ imagesTs/ labelsTs/
                    attributes.csv                   case,patient,scanner,disease of training and test cases
                    counterfactuals/CASE__INTERVENTION_0000.EXT

2D cases are 8 bit grey PNG, 3D cases 12 bit NIfTI with spacing. A counterfactual shares the mask of its case.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.phantom.anatomy import LABELS
from nnunet_cfcl.phantom.disease import DISEASES
from nnunet_cfcl.phantom.scanner import SCANNERS
from nnunet_cfcl.phantom.scm import INTERVENTIONS, Attributes, Patient, counterfactual, draw_patient, render

FILE_ENDING: dict[int, str] = {2: ".png", 3: ".nii.gz"}
LEVELS: dict[int, int] = {2: 255, 3: 4095}
"""Largest stored value, that of image intensity 1."""
FIRST_TEST_INDEX = 100_000
"""Patient number of the first test case, so that test patients do not depend on the number of training patients."""
GENERATOR = "nnunet_cfcl.phantom"


@dataclass(frozen=True)
class Case:
    """One patient with the attributes of the factual image."""

    name: str
    patient: Patient
    attributes: Attributes


def assign_attributes(position: int, scanners: Sequence[str]) -> Attributes:
    """Return the attributes of case number `position`: all combinations in turn, so that groups are balanced.

    The assignment depends on the position alone, so anatomy and attributes are independent (a randomised design).
    """
    return Attributes(scanners[position % len(scanners)], DISEASES[position // len(scanners) % len(DISEASES)])


def phantom_cases(
    count: int,
    seed: int,
    dim: int = 2,
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    scanners: Sequence[str] = tuple(SCANNERS),
    test: bool = False,
) -> list[Case]:
    """Draw cases; patient number i does not depend on `count` and `scanners`.

    Args:
        count: Number of cases.
        seed, dim, shape, spacing: As for `draw_patient`.
        scanners: Scanners of the cases, in turn.
        test: Draw test patients (numbers from `FIRST_TEST_INDEX`) instead of training patients.

    Raises:
        UserError: If no scanner or an unknown one is given, or the grid is too small for the phantom.
    """
    if not scanners:
        raise UserError("no scanner given", f"name at least one of {', '.join(SCANNERS)}")
    first = FIRST_TEST_INDEX if test else 0
    return [
        Case(
            f"phantom_{first + i:06d}",
            draw_patient(seed, first + i, dim, shape, spacing),
            assign_attributes(i, scanners),
        )
        for i in range(count)
    ]


def _write_array(path: Path, array: NDArray[np.integer], spacing: Sequence[float]) -> None:
    if array.ndim == 2:
        from skimage import io

        io.imsave(path, array, check_contrast=False)
        return
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    SimpleITK.WriteImage(image, str(path), useCompression=True)


def quantise(image: NDArray[np.float32]) -> NDArray[np.integer]:
    """Quantise an image in [0, 1]: uint8 up to 255 in 2D, int16 up to 4095 in 3D."""
    return np.rint(image * LEVELS[image.ndim]).astype(np.uint8 if image.ndim == 2 else np.int16)


def _write_case(folder: Path, case: Case, split: str) -> None:
    patient, ending = case.patient, FILE_ENDING[len(case.patient.shape)]
    factual = render(patient, case.attributes.scanner, case.attributes.disease)
    _write_array(folder / f"images{split}" / f"{case.name}_0000{ending}", quantise(factual.image), patient.spacing)
    _write_array(folder / f"labels{split}" / f"{case.name}{ending}", factual.mask, patient.spacing)
    for intervention in INTERVENTIONS:
        image = counterfactual(patient, case.attributes, intervention).image
        name = f"{case.name}__{intervention}_0000{ending}"
        _write_array(folder / "counterfactuals" / name, quantise(image), patient.spacing)


def _write_tables(folder: Path, cases: Sequence[Case], training: int, phantom: dict[str, object]) -> None:
    dim = len(cases[0].patient.shape)
    description = {
        "channel_names": {"0": "phantom"},
        "labels": LABELS,
        "numTraining": training,
        "file_ending": FILE_ENDING[dim],
        "phantom": {"generator": GENERATOR, **phantom},
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    with open(folder / "attributes.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "patient", "scanner", "disease"])
        for case in cases:
            table.writerow([case.name, f"P{case.patient.index:06d}", case.attributes.scanner, case.attributes.disease])


def _is_phantom(folder: Path) -> bool:
    try:
        return bool(read_json(folder / "dataset.json")["phantom"]["generator"] == GENERATOR)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_target(target: Path, dataset_id: int, overwrite: bool) -> None:
    """Reject a target that holds other data or whose dataset number is ambiguous."""
    if not 0 < dataset_id < 1000:
        raise UserError(f"the dataset number must lie between 1 and 999, found {dataset_id}")
    for other in sorted(target.parent.glob(f"Dataset{dataset_id:03d}_*")):
        if other != target:
            raise UserError(f"dataset number {dataset_id} is taken by {other}", "choose another --dataset-id")
    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists", "choose another number or name, or pass --overwrite")
    # --overwrite deletes a folder: never one with real images
    if target.exists() and not _is_phantom(target):
        raise UserError(f"{target} was not written by the phantom and is not overwritten",
                        "choose another number or name")


def _replace_folder(new: Path, target: Path) -> None:
    # remove the old dataset only after the new one is complete
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def write_phantom_dataset(
    raw_folder: str | Path,
    dataset_id: int,
    name: str,
    dim: int,
    patients: int,
    test_patients: int,
    seed: int,
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    train_scanners: Sequence[str] = ("A",),
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write an nnU-Net raw dataset of phantom patients. The module's docstring shows its layout.

    The folder gets its name when it is complete. Test cases come from both scanners in turn.

    Args:
        raw_folder: nnU-Net's raw folder.
        dataset_id, name: Number and name in the folder's name, DatasetXXX_Name.
        dim: 2 or 3.
        patients, test_patients: Numbers of training and test cases; at least one training case.
        seed: Patient i depends on (seed, i) and the grid alone.
        shape: Image size ([z,] y, x).
        spacing: Pixel size in mm, same axes. PNG cannot store it: 2D images are read as 1 mm by nnU-Net.
        train_scanners: Scanners of the training cases.
        overwrite: Replace a phantom dataset of the same number and name.
        progress: Show a progress bar.

    Returns:
        The dataset's folder.

    Raises:
        UserError: If the folder exists, the number is taken, or an argument is out of range.
    """
    if patients < 1 or test_patients < 0:
        raise UserError("at least one training patient and no negative number of test patients are needed, found "
                        f"{patients} and {test_patients}")
    target = Path(raw_folder) / f"Dataset{dataset_id:03d}_{name}"
    _check_target(target, dataset_id, overwrite)
    train = phantom_cases(patients, seed, dim, shape, spacing, train_scanners)
    test = phantom_cases(test_patients, seed, dim, shape, spacing, test=True)
    # written on the same file system, so that one rename completes it
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs", "counterfactuals"):
        (partial / folder).mkdir(parents=True)
    jobs = [(case, "Tr") for case in train] + [(case, "Ts") for case in test]
    for case, split in tqdm(jobs, desc=f"phantom {dim}D", unit="patient", disable=not progress):
        _write_case(partial, case, split)
    grid = {"shape": train[0].patient.shape, "spacing": train[0].patient.spacing}
    _write_tables(partial, train + test, patients, {"seed": seed, "train_scanners": list(train_scanners), **grid})
    _replace_folder(partial, target)
    return target
