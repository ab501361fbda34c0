"""Gate of a generator on real chest X-rays of two scanners (hospitals), healthy and with tuberculosis.

Writes the images, 128 x 128, as an nnU-Net dataset with attributes.csv, plans and preprocesses it with nnU-Net's
command, and runs phase 0 as the trainers do: training, gate, report. The gate's metrics on held-out patients go into a
JSON file; the report with its plots stays in the folder that is printed. Patients are held out by the generator itself
(fold "all" has no validation cases).

    python benchmarks/generator_chest_xrays.py --work /tmp/cxr --out benchmark_results
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DATASET = "Dataset020_ChestXrays"
#: Settings for two cores and about half an hour; the defaults are meant for a GPU.
SETTINGS: dict[str, Any] = {
    "pretrain": {"data": "training"},
    "generator": {"width": 12, "blocks": 1, "images_per_step": 8, "epochs": 18, "iterations_per_epoch": 100,
                  "ema": 0.998, "finetune_epochs": 2},
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CFCL_TEST_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, required=True, help="folder for nnU-Net's files; kept")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, changes of the section generator")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    return parser.parse_args()


def write_dataset(data: Path, raw: Path, size: int) -> None:
    """Write all X-rays, downsampled, with their masks and attributes."""
    from PIL import Image

    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    with open(data / "cxr" / "meta.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        case = row["case_id"]
        image, mask = (Image.open(data / "cxr" / name / f"{case}.png") for name in ("images", "masks"))
        image.resize((size, size), Image.Resampling.BOX).save(raw / "imagesTr" / f"{case}_0000.png")
        mask.resize((size, size), Image.Resampling.NEAREST).save(raw / "labelsTr" / f"{case}.png")
    with open(raw / "attributes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "patient", "scanner", "disease"])
        table.writerows([row["case_id"], row["patient_id"], row["scanner"], row["disease"]] for row in rows)
    labels = {"background": 0, "right lung": 1, "left lung": 2}
    (raw / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "xray"}, "labels": labels, "numTraining": len(rows), "file_ending": ".png"}))


def prepare(arguments: argparse.Namespace) -> None:
    """Create nnU-Net's folders, plan and preprocessed data, where they do not exist."""
    for name in ("raw", "preprocessed", "results"):
        folder = (arguments.work / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder)
    settings = {**SETTINGS, "generator": {**SETTINGS["generator"], **arguments.settings}}
    (arguments.work / "settings.json").write_text(json.dumps(settings, indent=1))
    os.environ["nnUNet_cfcl_config"] = str((arguments.work / "settings.json").resolve())
    if not (arguments.work / "raw" / DATASET / "dataset.json").exists():
        write_dataset(arguments.data, arguments.work / "raw" / DATASET, arguments.size)
    if not (arguments.work / "preprocessed" / DATASET / "nnUNetPlans_2d").exists():
        module = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
        entry = f"from {module} import plan_and_preprocess_entry as entry; entry()"
        command = [sys.executable, "-c", entry, "-d", DATASET[7:10], "-c", "2d", "-np", "2", "-npfp", "2", "--no_pbar"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"nnUNet_n_proc_DA": "1"})
    os.environ["nnUNet_n_proc_DA"] = "0"


def main() -> None:
    """Train, judge, write the figures."""
    arguments = parse_arguments()
    prepare(arguments)
    import torch
    from pretraining_setup import write_result

    from nnunet_cfcl.nnunet.fold import FoldContext
    from nnunet_cfcl.phases.generator_phase import GeneratorPhase
    from nnunet_cfcl.runs.ranks import Ranks
    from nnunet_cfcl.trainers.lookup import find_trainer

    torch.set_num_threads(arguments.threads)
    fold = FoldContext.find(find_trainer("nnUNetTrainerDVDCL"), DATASET, "2d", "all", "nnUNetPlans",
                            torch.device(arguments.device), print)
    phase = GeneratorPhase(fold, Ranks())
    started = time.perf_counter()
    phase.trained()
    trained = time.perf_counter()
    judged = phase.judged()
    report = json.loads((phase.report_folder / "report.json").read_text())
    write_result(arguments.out, "generator_chest_xrays", {
        "training_minutes": (trained - started) / 60, "gate_minutes": (time.perf_counter() - trained) / 60,
        "threads": arguments.threads, "device": arguments.device, "passed": [one.name for one in judged.passed],
        "report": report})
    print(f"The report lies in {phase.report_folder}")


if __name__ == "__main__":
    main()
