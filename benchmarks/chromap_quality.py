"""Do CHRO-maps show anatomy, and does it keep its colour on another scanner? Compared with an untrained network.

Trains nnU-Net with `-tr nnUNetTrainerDVDCL` on real images (half of the plan's features, for two cores), and computes
the maps of the fold's validation cases and of their counterfactuals with `nnunet_cfcl chromap`, once with the trained
and once with the initial weights. Counterfactuals are analytic interventions on the acquisition, as in the pretraining
but with another seed; with ``--generator`` those of a trained generator. Metrics, on class-balanced voxels:

- accuracy of k-means clusters of the plane coordinates, one per class, matched to the classes;
- silhouette of the classes in the plane, -1 to 1;
- distance in the plane between a voxel and itself in the counterfactual, relative to that of two voxels of different
  classes.

    python benchmarks/chromap_quality.py --dataset hippocampus --work DIR --out benchmark_results
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray
from PIL import Image
from pretraining_setup import write_result
from sklearn.metrics import silhouette_score

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.whole_cases import CaseChange, SlidingWindowCounterfactuals
from nnunet_cfcl.counterfactual.source import AcquisitionSource
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.evaluation.probe.metrics import distance_between_classes, matched_clusters
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views.crop_box import CropBox

# defaults at the time of the results in docs/results/benchmarks.md, where they have changed since
SETTINGS = {
    "pretrain": {"data": "training", "epochs": 10, "iterations_per_epoch": 30, "images_per_step": 4,
                 "points_per_image": 500, "temperature": 0.7},
    "counterfactual": {"source": "acquisition", "count": 1},
    "finetune": {"epochs": 10, "iterations_per_epoch": 40, "val_iterations_per_epoch": 1, "mirror_axes": [],
                 "rotation_deg": 15, "initial_lr": 0.01, "warmup_fraction": 0.1},
}
DATASETS = {"cxr": ("Dataset020_ChestXrays", "2d"), "hippocampus": ("Dataset004_Hippocampus", "3d_fullres")}
PLANS, TRAINER = "halfPlans", "nnUNetTrainerDVDCL"
#: Name of a case, its preprocessed image (1, Z, Y, X), its number -> counterfactual.
Change = Callable[[str, NDArray[Any], int], NDArray[Any]]
#: Number of voxels per class and case for the metrics.
VOXELS = 150


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=tuple(DATASETS), required=True)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CFCL_TEST_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's files; kept")
    parser.add_argument("--cases", type=int, default=16, help="validation cases that are drawn")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, changes of the settings")
    parser.add_argument("--generator", type=Path, help="generator.pth, for counterfactuals of its first intervention")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    return parser.parse_args()


def run(*command: str) -> None:
    """Path of a command of this Python environment."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, check=True, env=environment)


def prepare(arguments: argparse.Namespace, dataset: str, configuration: str) -> None:
    """Create nnU-Net's folders, the dataset, its plan and preprocessed cases, where they do not exist."""
    from nnunet_cfcl.nnunet.installation import trainers_path

    for name in ("raw", "preprocessed", "results"):
        folder = (arguments.work / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    settings = arguments.work / "settings.json"
    settings.write_text(json.dumps({**SETTINGS, **arguments.settings}, indent=1))
    os.environ.update(nnUNet_cfcl_config=str(settings.resolve()), nnUNet_extTrainer=str(trainers_path()),
                      nnUNet_n_proc_DA="1", nnUNet_def_n_proc="1")
    raw, preprocessed = (arguments.work / name / dataset for name in ("raw", "preprocessed"))
    if not (raw / "dataset.json").exists():
        write_raw(arguments, raw)
    if not (preprocessed / f"{PLANS}.json").exists():
        run("nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-c", configuration, "-np", "1", "-npfp", "1",
            "--no_pbar")
        plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
        plans["plans_name"] = PLANS
        for one in plans["configurations"].values():
            network = one["architecture"]["arch_kwargs"]
            network["features_per_stage"] = [n // 2 for n in network["features_per_stage"]]
            one["batch_size"] = min(one["batch_size"], 4)
        (preprocessed / f"{PLANS}.json").write_text(json.dumps(plans))


def write_raw(arguments: argparse.Namespace, raw: Path) -> None:
    """The dataset in nnU-Net's layout."""
    if arguments.dataset == "cxr":
        from generator_chest_xrays import write_dataset

        write_dataset(arguments.data, raw, 128)
        (raw / "attributes.csv").unlink()  # no training of a generator
    else:
        shutil.copytree(arguments.data / raw.name, raw)


def models(arguments: argparse.Namespace, dataset: str, configuration: str) -> dict[str, Path]:
    """Model folders, trained and not."""
    trained = arguments.work / "results" / dataset / f"{TRAINER}__{PLANS}__{configuration}"
    checkpoint = trained / "fold_0" / "checkpoint_final.pth"
    if not checkpoint.exists():
        os.environ["nnUNet_n_proc_DA"] = "0"
        run("nnUNetv2_train", dataset[7:10], configuration, "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    untrained = arguments.work / "untrained"
    if not (untrained / "fold_0" / "checkpoint_final.pth").exists():
        from nnunetv2.run.run_training import get_trainer_from_args

        (untrained / "fold_0").mkdir(parents=True, exist_ok=True)
        for name in ("plans.json", "dataset.json"):
            shutil.copy(trained / name, untrained / name)
        trainer = get_trainer_from_args(dataset[7:10], configuration, 0, TRAINER, PLANS, device=torch.device("cpu"))
        trainer.initialize()
        content = torch.load(checkpoint, map_location="cpu", weights_only=False)
        content["network_weights"] = trainer.network.state_dict()
        torch.save(content, untrained / "fold_0" / "checkpoint_final.pth")
        fit_untrained(trainer, untrained)
    return {"untrained": untrained, "trained": trained}


def fit_untrained(trainer: Any, folder: Path) -> None:
    """Fit the colour space of the initial weights, as a training fits its own."""
    from nnunet_cfcl.chromap.nnunet.spaces import fit_after_training
    from nnunet_cfcl.nnunet.fold import FoldContext

    fit_after_training(replace(FoldContext.of(trainer), folder=folder / "fold_0"), trainer.network)


def validation_cases(arguments: argparse.Namespace, dataset: str) -> list[str]:
    """Choose evenly spaced validation cases of the fold."""
    splits = json.loads((arguments.work / "preprocessed" / dataset / "splits_final.json").read_text())
    names = sorted(splits[0]["val"])
    return [names[int(at)] for at in np.linspace(0, len(names) - 1, min(arguments.cases, len(names)))]


def write_images(arguments: argparse.Namespace, dataset: str, configuration: str, names: list[str]) -> dict[str, Path]:
    """Write the original images and their counterfactuals, in the format and geometry of the input."""
    folders = {kind: arguments.work / f"images_{kind}" for kind in ("original", "counterfactual")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    source = arguments.work / "raw" / dataset / "imagesTr"
    preprocessed = arguments.work / "preprocessed" / dataset / f"nnUNetPlans_{configuration}"
    change = generated(arguments) if arguments.generator else acquired(preprocessed, configuration)
    storage = infer_dataset_class(str(preprocessed))(str(preprocessed), names)
    for number, name in enumerate(names):
        file = next(source.glob(f"{name}_0000.*"))
        shutil.copy(file, folders["original"] / file.name)
        data, _, _, properties = storage.load_case(name)
        write_changed(file, folders["counterfactual"] / file.name, change(name, np.asarray(data), number), properties)
    return folders


def acquired(preprocessed: Path, configuration: str) -> Change:
    """Create interventions on the acquisition, with the scanners of other cases as targets."""
    reader = PreprocessedCases(str(preprocessed), infer_dataset_class(str(preprocessed)).get_identifiers(
        str(preprocessed)))
    flat = configuration == "2d"
    source = AcquisitionSource(reader, AcquisitionSettings(), ("ZScoreNormalization",), 2 if flat else 3)

    def change(name: str, image: NDArray[Any], number: int) -> NDArray[Any]:
        shape = image.shape[1:]
        drawn = source.draw(generator_for(1, number), name, CropBox((0, 0, 0), shape, shape, 2 if flat else 3), 1)
        originals = torch.from_numpy(image[:, 0] if flat else image)[None]
        return source.apply(originals, drawn, [1.0] * (2 if flat else 3)).numpy().reshape(image.shape)

    return change


def generated(arguments: argparse.Namespace) -> Change:
    """Create the generator's counterfactual of a chest X-ray on the other scanner."""
    generator = CounterfactualGenerator.load(arguments.generator)
    with open(arguments.data / "cxr" / "meta.csv", newline="") as file:
        rows = {row["case_id"]: row for row in csv.DictReader(file)}
    scanners = sorted({row["scanner"] for row in rows.values()})

    def change(name: str, image: NDArray[Any], number: int) -> NDArray[Any]:
        cells = {key: rows[name][key] for key in ("scanner", "disease")}
        other = {**cells, "scanner": next(one for one in scanners if one != cells["scanner"])}
        reader = OneCase(name, image)
        blender = SlidingWindowCounterfactuals(generator, reader, SlidingWindows(generator.patch_size), 4,
                                               zero_is_outside=False)
        jobs = [CaseChange(name, generator.coding.encode(cells), generator.coding.encode(other)[None])]
        return torch.cat([slab.images[0] for slab in blender.slabs(jobs)], 1).numpy().reshape(image.shape)

    return change


class OneCase:
    """Case reader of the generator over one preprocessed image (C, Z, Y, X)."""

    def __init__(self, name: str, image: NDArray[Any]) -> None:
        self.cases = self.known = (name,)
        self.labelled: tuple[str, ...] = ()
        self._image = image

    def shape(self, case: str) -> tuple[int, ...]:
        """(C, Z, Y, X)."""
        return tuple(self._image.shape)

    def read(self, case: str, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x)."""
        return np.asarray(self._image[(slice(None), *box)], np.float32)

    def labels(self, case: str, box: tuple[slice, ...]) -> None:
        """None."""


def write_changed(file: Path, target: Path, changed: NDArray[Any], properties: dict[str, Any]) -> None:
    """Convert a preprocessed counterfactual (1, Z, Y, X) to the intensities and geometry of the original file.

    These datasets are z-scored and not resampled.
    """
    picture = file.name.endswith(".png")
    image = nibabel.load(file) if not picture else None
    raw = np.asarray(Image.open(file))[None] if picture else np.asarray(image.dataobj).transpose(2, 1, 0)
    raw = raw.astype(np.float32)
    box = tuple(slice(*sides) for sides in properties["bbox_used_for_cropping"])
    if raw[box].shape != changed.shape[1:]:
        raise ValueError(f"{file.name} was resampled from {raw[box].shape} to {changed.shape[1:]}")
    raw[box] = changed[0] * raw[box].std() + raw[box].mean()
    if picture:
        Image.fromarray(np.clip(raw[0], 0, 255).round().astype(np.uint8)).save(target)
    else:
        nibabel.save(nibabel.Nifti1Image(raw.transpose(2, 1, 0), image.affine), target)


def read_plane(folder: Path, name: str) -> NDArray[np.float32]:
    """Read the coordinates (Z, Y, X, 2) of a map, written with ``--embedding``."""
    stored = np.asarray(nibabel.load(folder / "chromap" / f"{name}_embedding.nii.gz").dataobj)
    return stored[:, :, :, 0].transpose(2, 1, 0, 3)


def read_labels(raw: Path, name: str) -> NDArray[np.int64]:
    """(Z, Y, X)."""
    file = next((raw / "labelsTr").glob(f"{name}.*"))
    if file.name.endswith(".png"):
        return np.asarray(Image.open(file))[None].astype(np.int64)
    return np.asarray(nibabel.load(file).dataobj).transpose(2, 1, 0).astype(np.int64)


def measure(raw: Path, original: Path, counterfactual: Path, names: list[str]) -> dict[str, float]:
    """The figures of one network."""
    random = np.random.default_rng(0)
    points, after, classes = [], [], []
    for name in names:
        plane, changed, labels = read_plane(original, name), read_plane(counterfactual, name), read_labels(raw, name)
        for label in np.unique(labels):
            chosen = np.flatnonzero((labels == label) & plane.any(-1))
            chosen = random.permutation(chosen)[:VOXELS]
            points.append(plane.reshape(-1, 2)[chosen])
            after.append(changed.reshape(-1, 2)[chosen])
            classes.append(np.full(len(chosen), label))
    place, moved, label = np.concatenate(points), np.concatenate(after), np.concatenate(classes)
    matched = np.mean(matched_clusters(place, label, seed=0) == label)
    some = random.permutation(len(label))[:4000]
    between = distance_between_classes(place, label, random)
    foreground = label > 0
    step = np.linalg.norm(moved - place, axis=1)
    return {
        "kmeans_accuracy": float(matched), "silhouette": float(silhouette_score(place[some], label[some])),
        "silhouette_foreground": float(silhouette_score(place[some][foreground[some]],
                                                        label[some][foreground[some]])),
        "counterfactual_distance": float(step.mean() / between),
        "counterfactual_distance_foreground": float(step[foreground].mean() / between)}


def main() -> None:
    """Train, draw, measure."""
    arguments = parse_arguments()
    dataset, configuration = DATASETS[arguments.dataset]
    prepare(arguments, dataset, configuration)
    folders = models(arguments, dataset, configuration)
    names = validation_cases(arguments, dataset)
    images = write_images(arguments, dataset, configuration, names)
    found: dict[str, Any] = {"cases": len(names), "counterfactuals": "generator" if arguments.generator else
                             "acquisition", "settings": {**SETTINGS, **arguments.settings}}
    for network, folder in folders.items():
        maps = {kind: arguments.work / "maps" / f"{network}_{kind}" for kind in images}
        for kind, source in images.items():
            run("nnunet_cfcl", "chromap", "-i", str(source), "-o", str(maps[kind]), "-m", str(folder), "-f", "0",
                "-device", "cpu", "--embedding", "--disable_tta")
        found[network] = measure(arguments.work / "raw" / dataset, maps["original"], maps["counterfactual"], names)
    write_result(arguments.out, f"chromap_quality_{arguments.dataset}", found)


if __name__ == "__main__":
    main()
