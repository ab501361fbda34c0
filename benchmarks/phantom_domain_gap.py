"""Domain gap of the phantom: stock nnU-Net, trained briefly on one scanner, tested on both.

Writes the phantom, plans and preprocesses it with nnU-Net's own command, trains `nnUNetTrainer` on all training
cases for a few hundred steps and predicts every test patient as each scanner shows it (one is the image taken, the
other the true counterfactual, so both scanners show the same patients). Prints and writes the Dice scores as JSON.

    python benchmarks/phantom_domain_gap.py --dim 2 --train-scanner A --out phantom_gap_2d_A.json
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DATASET_ID = 900
CONFIGURATION = {2: "2d", 3: "3d_fullres"}
SCANNERS = ("A", "B")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, choices=(2, 3), default=2)
    parser.add_argument("--train-scanner", choices=SCANNERS, default="A")
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--test-patients", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=500, help="training steps in all, 50 per epoch")
    parser.add_argument("--batch-size", type=int, default=None, help="default 8 in 2D, 2 in 3D")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=None, help="folder for nnU-Net's files; temporary if not given")
    parser.add_argument("--out", type=Path, default=Path("phantom_domain_gap.json"))
    return parser.parse_args()


def set_folders(work: Path) -> None:
    """Set nnU-Net's folders to `work`; must precede the import of nnU-Net."""
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}


def plan(folder: Path, dim: int, batch_size: int) -> Path:
    """Plan and preprocess with nnU-Net's command, then set the batch size, which it keeps at 2 for small datasets."""
    module = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
    entry = f"from {module} import plan_and_preprocess_entry as entry; entry()"
    options = ["-d", str(DATASET_ID), "-c", CONFIGURATION[dim], "-np", "1", "-npfp", "1", "--verify_dataset_integrity"]
    command = [sys.executable, "-c", entry, *options]
    # nnU-Net's planner uses this number as its thread count and fails with 0
    environment = os.environ | {"nnUNet_n_proc_DA": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / folder.name
    path = preprocessed / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION[dim]]["batch_size"] = batch_size
    path.write_text(json.dumps(plans, indent=2))
    return preprocessed


def train(preprocessed: Path, dim: int, iterations: int, seed: int, device: str) -> nnUNetTrainer:
    """Train stock nnU-Net, all its augmentation on, on all training cases; return the trainer."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    # nnU-Net draws its batches from the global generator
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    description = json.loads((preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, CONFIGURATION[dim], "all", description, torch.device(device))
    trainer.num_iterations_per_epoch = min(50, iterations)
    trainer.num_epochs = max(1, iterations // trainer.num_iterations_per_epoch)
    trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    return trainer


def predictor_of(trainer: nnUNetTrainer) -> nnUNetPredictor:
    """Wrap the trained network in nnU-Net's predictor, with mirroring as it is by default."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=False, allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


def dice(prediction: np.ndarray, truth: np.ndarray, label: int) -> float:
    """Return the Dice score of one label in per cent; 100 if neither mask has it."""
    p, t = prediction == label, truth == label
    total = p.sum() + t.sum()
    return 100.0 if total == 0 else float(200.0 * (p & t).sum() / total)


def evaluate(trainer: nnUNetTrainer, folder: Path) -> list[dict]:
    """Predict every test patient as each scanner shows it; return one row of Dice scores per image."""
    predictor = predictor_of(trainer)
    reader = trainer.plans_manager.image_reader_writer_class()
    ending, labels = trainer.dataset_json["file_ending"], trainer.dataset_json["labels"]
    organs = {name: value for name, value in labels.items() if name != "background"}
    with open(folder / "attributes.csv", newline="") as file:
        taken = {row["case"]: row for row in csv.DictReader(file)}
    rows = []
    for path in sorted((folder / "labelsTs").glob(f"*{ending}")):
        case = path.name.removesuffix(ending)
        truth = reader.read_seg(str(path))[0][0]
        for scanner in SCANNERS:
            same = scanner == taken[case]["scanner"]
            image = f"imagesTs/{case}_0000" if same else f"counterfactuals/{case}__scanner_0000"
            array, properties = reader.read_images((str(folder / f"{image}{ending}"),))
            prediction = predictor.predict_single_npy_array(array, properties)
            scores = {name: dice(prediction, truth, value) for name, value in organs.items()}
            mean = float(np.mean(list(scores.values())))
            rows.append({"case": case, "scanner": scanner, "disease": taken[case]["disease"], **scores, "mean": mean})
    return rows


def summarise(rows: list[dict]) -> dict[str, float]:
    """Return mean foreground Dice per scanner, per scanner and disease, and per scanner and organ."""
    summary: dict[str, float] = {}
    organs = [key for key in rows[0] if key not in ("case", "scanner", "disease", "mean")]
    for scanner in SCANNERS:
        mine = [row for row in rows if row["scanner"] == scanner]
        summary[scanner] = float(np.mean([row["mean"] for row in mine]))
        for disease in sorted({row["disease"] for row in mine}):
            scores = [row["mean"] for row in mine if row["disease"] == disease]
            summary[f"{scanner}.{disease}"] = float(np.mean(scores))
        for organ in organs:
            summary[f"{scanner}.{organ}"] = float(np.mean([row[organ] for row in mine]))
    return summary


def run(arguments: argparse.Namespace, work: Path) -> dict:
    """Run the whole experiment in `work` and return its results as JSON."""
    set_folders(work)
    import torch

    from nnunet_cfcl.phantom import write_phantom_dataset

    torch.set_num_threads(arguments.threads)
    dim = arguments.dim
    batch_size = arguments.batch_size or {2: 8, 3: 2}[dim]
    name = f"Phantom{dim}D{arguments.train_scanner}"
    counts = (arguments.patients, arguments.test_patients, arguments.seed)
    scanners = (arguments.train_scanner,)
    folder = write_phantom_dataset(
        work / "raw", DATASET_ID, name, dim, *counts, train_scanners=scanners, overwrite=True
    )
    preprocessed = plan(folder, dim, batch_size)
    start = time.time()
    trainer = train(preprocessed, dim, arguments.iterations, arguments.seed, arguments.device)
    seconds = time.time() - start
    rows = evaluate(trainer, folder)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("work", "out")}
    patch = list(trainer.configuration_manager.patch_size)
    settings |= {"batch_size": batch_size, "patch_size": patch, "training_seconds": round(seconds)}
    return {"settings": settings, "dice": summarise(rows), "cases": rows}


def main() -> None:
    """Run the experiment, print the summary, write the JSON file."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(arguments, arguments.work or Path(temporary))
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["dice"], indent=2))


if __name__ == "__main__":
    main()
