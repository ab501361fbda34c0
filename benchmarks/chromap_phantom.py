"""A CHRO-map of the phantom on both scanners: the picture of the README and of the how-to page.

Trains `-tr nnUNetTrainerDVDCL` on synthetic patients of scanner A and their true counterfactuals on scanner B, in
pretraining and fine-tuning, and predicts test patients as both scanners show them with ``nnunet_cfcl predict
--chromap``. Network and training are small (minutes on one CPU core); the picture illustrates, it measures nothing.

    python benchmarks/chromap_phantom.py --work WORK --out docs/images
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from nnunet_cfcl.nnunet.installation import trainers_path
from nnunet_cfcl.phantom.anatomy import LABELS

TRAINER, PLANS, DATASET = "nnUNetTrainerDVDCL", "smallPlans", "Dataset905_Phantom2D"
SETTINGS: dict[str, Any] = {
    "pretrain": {"epochs": 4, "iterations_per_epoch": 30, "images_per_step": 4, "points_per_image": 128},
    "views": {"crop_fraction": [0.3, 1.0]},
    "counterfactual": {"source": "precomputed", "count": 1},
    "finetune": {"epochs": 8, "iterations_per_epoch": 40, "val_iterations_per_epoch": 1, "mirror_axes": [],
                 "counterfactual_probability": 0.5},
    "chromap": {"samples": 4000},
}
#: Resolutions and channels of the network's first resolution; nnU-Net's plan has 5 and 32.
STAGES, FEATURES, BATCH = 4, 8, 4
#: Test patients of the picture; every second one is shown by scanner B in the dataset.
PATIENTS = ("phantom_100000", "phantom_100001")
COLOURS = {1: (90, 170, 255), 2: (230, 80, 80), 3: (250, 220, 100)}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's files; kept, and reused")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder of the picture")
    return parser.parse_args()


def run(work: Path, *command: str) -> None:
    """Run one of the commands that come with this Python."""
    folders = {f"nnUNet_{name}": str(work / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
    subprocess.run(command, check=True, env={
        "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", **os.environ, **folders,
        "nnUNet_cfcl_config": str(work / "settings.json"), "nnUNet_extTrainer": str(trainers_path()),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})


def prepare(work: Path) -> None:
    """Write the dataset, a plan with a small network, and the store of true counterfactuals."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(json.dumps(SETTINGS, indent=1))
    run(work, "nnunet_cfcl", "phantom", "--out", str(work / "nnUNet_raw"), "--dataset-id", "905", "--dim", "2",
        "--shape", "96", "96", "--patients", "24", "--test-patients", "4", "--overwrite")
    # nnU-Net's planner uses this number as its thread count and fails on 0
    os.environ["nnUNet_n_proc_DA"] = "1"
    run(work, "nnUNetv2_plan_and_preprocess", "-d", "905", "-c", "2d", "-np", "1", "-npfp", "1")
    del os.environ["nnUNet_n_proc_DA"]
    folder = work / "nnUNet_preprocessed" / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    configuration = plans["configurations"]["2d"]
    configuration["batch_size"] = BATCH
    network = configuration["architecture"]["arch_kwargs"]
    network["n_stages"] = STAGES
    for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
        network[key] = network[key][:STAGES]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: STAGES - 1]
    network["features_per_stage"] = [FEATURES * 2**stage for stage in range(STAGES)]
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))
    images = work / "counterfactuals_of_training_cases"
    images.mkdir(exist_ok=True)
    for file in (work / "nnUNet_raw" / DATASET / "counterfactuals").glob("phantom_0*__scanner_0000.png"):
        shutil.copy(file, images)
    run(work, "nnunet_cfcl", "counterfactuals", "import", "-d", "905", "-c", "2d", "-p", PLANS, "-i",
        str(images), "-np", "1")


def train_and_predict(work: Path) -> Path:
    """Train, then predict the test patients as both scanners show them.

    Returns:
        Folder of images CASE_on_SCANNER, their masks and, in ``chromap``, their maps.
    """
    raw, images, out = work / "nnUNet_raw" / DATASET, work / "images", work / "predictions"
    if not (work / "nnUNet_results" / DATASET / f"{TRAINER}__{PLANS}__2d/fold_0/checkpoint_final.pth").exists():
        prepare(work)
        run(work, "nnUNetv2_train", "905", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    images.mkdir(exist_ok=True)
    for number, case in enumerate(PATIENTS):
        own, other = "AB" if number % 2 == 0 else "BA"
        shutil.copy(raw / "imagesTs" / f"{case}_0000.png", images / f"{case}_on_{own}_0000.png")
        counterfactual = raw / "counterfactuals" / f"{case}__scanner_0000.png"
        shutil.copy(counterfactual, images / f"{case}_on_{other}_0000.png")
    run(work, "nnunet_cfcl", "predict", "-i", str(images), "-o", str(out), "-d", "905", "-c", "2d", "-f", "0", "-tr",
        TRAINER, "-p", PLANS, "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta", "--chromap")
    return out


def compose(work: Path, predictions: Path, file: Path) -> None:
    """Draw image, mask and CHRO-map: a row per patient, scanner A on the left, scanner B on the right."""
    figure = Figure(figsize=(9.6, 1.75 * len(PATIENTS)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PATIENTS), 6)
    for row, case in zip(panels, PATIENTS):
        for place, scanner in enumerate("AB"):
            name = f"{case}_on_{scanner}"
            grey = np.asarray(Image.open(work / "images" / f"{name}_0000.png"))
            mask = np.asarray(Image.open(predictions / f"{name}.png"))
            overlay = np.repeat(grey[..., None], 3, axis=2)
            for label, colour in COLOURS.items():
                overlay[mask == label] = 0.35 * overlay[mask == label] + 0.65 * np.array(colour)
            shown = (grey, overlay, np.asarray(Image.open(predictions / "chromap" / f"{name}.png")))
            for panel, picture in zip(row[3 * place:], shown):
                panel.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                panel.set_axis_off()
    for panel, title in zip(panels[0], 2 * ("image", "mask", "CHRO-map")):
        panel.set_title(title, fontsize=9)
    for place, scanner in ((0.25, "A"), (0.75, "B")):
        figure.text(place, 1.0, f"scanner {scanner}", ha="center", va="bottom", fontsize=11)
    figure.savefig(file, dpi=100, bbox_inches="tight")


def main() -> None:
    """Write chromap_phantom.png."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    assert set(COLOURS) == set(LABELS.values()) - {0}
    work = arguments.work.resolve()
    compose(work, train_and_predict(work), arguments.out / "chromap_phantom.png")


if __name__ == "__main__":
    main()
