"""Three datasets of the study as nnU-Net raw datasets: labelled cases, pool, and test patients.

    DatasetXXX_Name/imagesTr, labelsTr        labelled cases, all of one scanner
                    imagesUn                  pool: unlabelled images of both scanners
                    imagesTs, labelsTs        other patients, of both scanners
                    attributes.csv            case, patient, scanner, disease of the labelled cases and the pool
                    test.csv                  the same of the test cases, and their half: development or report

The report half is never used for choices. Choices on the development half use labels of the other scanner; they are
documented with the results, and baselines get the same search.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nnunet_cfcl.files.atomic import write_text_atomically

Row = dict[str, str]
DEVELOPMENT, REPORT = "development", "report"
#: Number of test patients of each scanner and disease for choices, and for the report.
CHEST_X_RAYS_PER_GROUP = {DEVELOPMENT: 10, REPORT: 20}
HIPPOCAMPI = {DEVELOPMENT: 9, REPORT: 19}
PHANTOMS = {"pool": 80, DEVELOPMENT: 20, REPORT: 40}
LUNGS = {"background": 0, "right lung": 1, "left lung": 2}


@dataclass(frozen=True)
class StudyDataset:
    """Dataset of the study.

    Attributes:
        number: number of nnU-Net's dataset, without the label budget, which is added.
        name: name of nnU-Net's dataset.
        configuration: configuration of nnU-Net.
        own: scanner of the labelled cases.
        other: the other scanner.
        groups: columns by which results are reported.
        write: function of source of the data, raw folder, label budget and image size.
        sided: whether labels are defined by side, so that swaps of left and right are counted.
    """

    number: int
    name: str
    configuration: str
    own: str
    other: str
    groups: tuple[str, ...]
    write: Callable[[Path, Path, int, int], None]
    sided: bool = False

    def folder(self, budget: int) -> str:
        """Name of nnU-Net's dataset with a label budget."""
        return f"Dataset{self.number + budget:03d}_{self.name}"


def _write_table(file: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    with open(file, "w", newline="") as target:
        table = csv.DictWriter(target, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _write_tables(raw: Path, split: Mapping[str, Sequence[Row]], description: Mapping[str, Any]) -> None:
    columns = ("case", "patient", "scanner", "disease")
    _write_table(raw / "attributes.csv", [*split["labelled"], *split["pool"]], columns)
    test = [{**row, "half": half} for half in (DEVELOPMENT, REPORT) for row in split[half]]
    _write_table(raw / "test.csv", test, (*columns, "half"))
    # written last: marks the dataset as complete
    text = json.dumps({**description, "numTraining": len(split["labelled"])}, indent=1)
    write_text_atomically(raw / "dataset.json", text)


def _places(split: Mapping[str, Sequence[Row]], raw: Path) -> list[tuple[Row, Path, Path | None]]:
    """Create the folders and iterate over row, folder of the image, and folder of the mask or None of every case."""
    folders = {"labelled": ("imagesTr", "labelsTr"), "pool": ("imagesUn", None),
               DEVELOPMENT: ("imagesTs", "labelsTs"), REPORT: ("imagesTs", "labelsTs")}
    for names in folders.values():
        for name in filter(None, names):
            (raw / name).mkdir(parents=True, exist_ok=True)
    return [(row, raw / images, raw / masks if masks else None)
            for part, (images, masks) in folders.items() for row in split[part]]


def split_chest_x_rays(rows: Sequence[Row], budget: int) -> dict[str, list[Row]]:
    """Assign patients in a random order to report, development, labelled cases and pool.

    All images of a patient stay together. A smaller budget is a subset of a larger one.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    groups: dict[tuple[str, str], list[list[Row]]] = {}
    patients: dict[str, list[Row]] = {}
    for place in order:
        patients.setdefault(rows[place]["patient"], []).append(rows[place])
    for images in patients.values():
        groups.setdefault((images[0]["scanner"], images[0]["disease"]), []).append(images)
    split: dict[str, list[Row]] = {"labelled": [], "pool": [], DEVELOPMENT: [], REPORT: []}
    for (scanner, _), members in sorted(groups.items()):
        counts = {REPORT: CHEST_X_RAYS_PER_GROUP[REPORT], DEVELOPMENT: CHEST_X_RAYS_PER_GROUP[DEVELOPMENT],
                  "labelled": budget // 2 if scanner == "eureka_cr" else 0, "pool": len(members)}
        rest = list(members)
        for part, count in counts.items():
            taken, rest = rest[:count], rest[count:]
            split[part] += [row for images in taken for row in images]
    return split


def write_chest_x_rays(data: Path, raw: Path, budget: int, size: int) -> None:
    """Choose labelled images of Montgomery County, half healthy and half with tuberculosis."""
    with open(data / "cxr" / "meta.csv", newline="") as file:
        rows = [{**row, "case": row["case_id"], "patient": row["patient_id"]} for row in csv.DictReader(file)]
    split = split_chest_x_rays(rows, budget)
    for row, images, masks in _places(split, raw):
        case = row["case"]
        image = Image.open(data / "cxr" / "images" / f"{case}.png")
        image.resize((size, size), Image.Resampling.BOX).save(images / f"{case}_0000.png")
        if masks:
            mask = Image.open(data / "cxr" / "masks" / f"{case}.png")
            mask.resize((size, size), Image.Resampling.NEAREST).save(masks / f"{case}.png")
    _write_tables(raw, split, {"channel_names": {"0": "xray"}, "labels": LUNGS, "file_ending": ".png"})


def on_other_scanner(volume: NDArray[np.floating], spacing: Sequence[float], seed: int) -> NDArray[np.float32]:
    """Simulate the phantom's scanner B on a volume (Z, Y, X), in the volume's range of intensities."""
    from nnunet_cfcl.phantom.scanner import SCANNER_B, apply_scanner, draw_acquisition_noise

    low, high = np.percentile(volume, (0.5, 99.5))
    scene = np.clip((volume - low) / max(float(high - low), 1e-6), 0, 1)
    noise = draw_acquisition_noise(np.random.default_rng([1, seed]), volume.shape)
    return (low + (high - low) * apply_scanner(scene, SCANNER_B, noise, spacing)).astype(np.float32)


def split_hippocampi(names: Sequence[str], budget: int) -> dict[str, list[Row]]:
    """Assign the simulated scanner to every second volume of the pool, and both scanners to test patients."""
    order = [names[place] for place in np.random.default_rng(0).permutation(len(names))]
    cut = HIPPOCAMPI[REPORT], HIPPOCAMPI[REPORT] + HIPPOCAMPI[DEVELOPMENT]
    parts = {REPORT: order[: cut[0]], DEVELOPMENT: order[cut[0] : cut[1]],
             "labelled": order[cut[1] :][:budget], "pool": order[cut[1] + budget :]}

    def row(name: str, scanner: str) -> Row:
        case = name if scanner == "original" else f"{name}_simulated"
        return {"case": case, "patient": name, "scanner": scanner, "disease": "none"}

    def scanners(part: str, place: int) -> tuple[str, ...]:
        shown = ("original", "simulated")
        return shown if part in (REPORT, DEVELOPMENT) else shown[:1] if part == "labelled" else (shown[place % 2],)

    return {part: [row(name, scanner) for place, name in enumerate(members) for scanner in scanners(part, place)]
            for part, members in parts.items()}


def write_hippocampi(data: Path, raw: Path, budget: int, size: int) -> None:
    """Write original volumes and, for "simulated", volumes of the phantom's scanner model."""
    source = data / "Dataset004_Hippocampus"
    names = sorted(file.name.removesuffix(".nii.gz") for file in (source / "labelsTr").glob("*.nii.gz"))
    split = split_hippocampi(names, budget)
    for row, images, masks in _places(split, raw):
        name, target = row["patient"], images / f"{row['case']}_0000.nii.gz"
        if row["scanner"] == "original":
            shutil.copy(source / "imagesTr" / f"{name}_0000.nii.gz", target)
        else:
            image = nibabel.load(source / "imagesTr" / f"{name}_0000.nii.gz")
            volume = np.asarray(image.dataobj, np.float32).transpose(2, 1, 0)
            shown = on_other_scanner(volume, [float(n) for n in image.header.get_zooms()[::-1]], names.index(name))
            nibabel.save(nibabel.Nifti1Image(shown.transpose(2, 1, 0), image.affine), target)
        if masks:
            shutil.copy(source / "labelsTr" / f"{name}.nii.gz", masks / f"{row['case']}.nii.gz")
    description = json.loads((source / "dataset.json").read_text())
    kept = {key: description[key] for key in ("channel_names", "labels", "file_ending") if key in description}
    _write_tables(raw, split, kept)


def write_phantoms(data: Path, raw: Path, budget: int, size: int) -> None:
    """Write labelled patients of scanner A, and a pool and test patients of both scanners.

    The true counterfactuals are in ``counterfactuals``, which only the arm "precomputed" uses.
    """
    from nnunet_cfcl.phantom.anatomy import LABELS
    from nnunet_cfcl.phantom.dataset import FILE_ENDING, quantise
    from nnunet_cfcl.phantom.scm import INTERVENTIONS, Attributes, counterfactual, draw_patient, render

    counts = {"labelled": budget, **PHANTOMS}
    first = {"labelled": 0, "pool": 10_000, DEVELOPMENT: 100_000, REPORT: 200_000}
    split: dict[str, list[Row]] = {part: [] for part in counts}
    for part, count in counts.items():
        for place in range(count):
            scanner, disease = "AB"[0 if part == "labelled" else place % 2], ("none", "effusion")[place // 2 % 2]
            number = first[part] + place
            split[part].append({"case": f"phantom_{number:06d}", "patient": f"P{number:06d}", "scanner": scanner,
                                "disease": disease})
    (raw / "counterfactuals").mkdir(parents=True, exist_ok=True)
    for row, images, masks in _places(split, raw):
        patient = draw_patient(0, int(row["patient"][1:]), 2, (size, size), None)
        attributes = Attributes(row["scanner"], row["disease"])
        taken = render(patient, attributes.scanner, attributes.disease)
        Image.fromarray(quantise(taken.image)).save(images / f"{row['case']}_0000{FILE_ENDING[2]}")
        if masks:
            Image.fromarray(taken.mask.astype(np.uint8)).save(masks / f"{row['case']}{FILE_ENDING[2]}")
        for one in INTERVENTIONS if images.name != "imagesTs" else ():
            shown = quantise(counterfactual(patient, attributes, one).image)
            Image.fromarray(shown).save(raw / "counterfactuals" / f"{row['case']}__{one}_0000{FILE_ENDING[2]}")
    _write_tables(raw, split, {"channel_names": {"0": "phantom"}, "labels": LABELS, "file_ending": FILE_ENDING[2]})


DATASETS: dict[str, StudyDataset] = {
    "chest_xrays": StudyDataset(700, "StudyChestXrays", "2d", "eureka_cr", "philips_dr", ("scanner", "disease"),
                                write_chest_x_rays, sided=True),
    "hippocampus": StudyDataset(800, "StudyHippocampus", "3d_fullres", "original", "simulated", ("scanner",),
                                write_hippocampi),
    "phantom": StudyDataset(900, "StudyPhantom", "2d", "A", "B", ("scanner", "disease"), write_phantoms),
}
