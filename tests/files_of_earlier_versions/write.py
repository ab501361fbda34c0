"""Writes the folder of files that `test_files_of_earlier_versions` reads; run with the code of the version to be kept.

In an empty folder, with that version importable (and nnU-Net's folders unset)::

    PYTHONPATH=CHECKOUT_OF_THAT_VERSION python write.py

The real commands write everything, with paths relative to that folder, so that no file names the machine. Weights and
images are as small as nnU-Net's plan allows. `KEPT` lists what is committed; the rest is deleted.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

import nnunet_cfcl

DATASET = "Dataset007_Tiny"
#: A network of two stages; and one of three for the colours of CHRO-maps, which need a finished fine-tuning: with two,
#: nnU-Net's deep supervision has no weights.
PLANS, THREE_STAGES = "tinyPlans", "threeStagesPlans"
TRAINING, POOL, SIDE = 6, 4, 32
SETTINGS = {
    "pretrain": {"epochs": 2, "iterations_per_epoch": 1, "images_per_step": 2, "points_per_image": 20,
                 "projection_hidden": 8, "projection_dim": 8},
    "counterfactual": {"source": "auto", "count": 1, "interventions": ["scanner"]},
    "generator": {"epochs": 1, "iterations_per_epoch": 1, "images_per_step": 2, "width": 4, "blocks": 1,
                  "finest_codes": 1, "finetune_epochs": 0},
    "gate": {"predictor_steps": 1, "segmenter_steps": 1, "cases": 2, "enabled": False},
    "finetune": {"epochs": 1, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1},
    "chromap": {"reducer": "pca", "samples": 200},
}
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
#: Trainers: phase 1 finished, with a generator; phase 1 on the pool, killed after its first epoch; no phase 1.
FINISHED, INTERRUPTED, FINE_TUNED = "nnUNetTrainerDVDCL", "nnUNetTrainerSMVDCL", "nnUNetTrainerCFCLScratch"


def main() -> None:
    """Write the dataset, train, and remove what no test reads."""
    for folder in FOLDERS:
        Path(folder, DATASET).mkdir(parents=True)
    write_raw(Path("nnUNet_raw", DATASET))
    write_settings("settings.json")
    write_settings("settings_pool.json", pretrain={"data": "pool"}, counterfactual={"source": "acquisition"})
    run("nnUNetv2_plan_and_preprocess", "-d", "7", "-c", "2d", "-np", "1", "-npfp", "1", "--no_pbar")
    for stages, plans in ((2, PLANS), (3, THREE_STAGES)):
        shorten_plan(Path("nnUNet_preprocessed", DATASET), stages, plans)
    run("nnunet_cfcl", "pool", "-d", "7", "-c", "2d", "-p", PLANS, "-np", "1")
    train = ("nnUNetv2_train", "7", "2d", "0", "-device", "cpu")
    run(*train, "-p", PLANS, "-tr", FINISHED, until="Phase 1 done")
    run(*train, "-p", PLANS, "-tr", INTERRUPTED, until="Pretraining epoch 0", settings="settings_pool.json")
    run(*train, "-p", THREE_STAGES, "-tr", FINE_TUNED, until="Colour space of CHRO-maps:")
    write_shim()
    for file in sorted(Path().rglob("*"), reverse=True):
        if file.is_dir() and not any(file.iterdir()):
            file.rmdir()
        elif file.is_file() and not is_kept(file):
            file.unlink()


def is_kept(file: Path) -> bool:
    """Whether a test reads it: data, and what the plugin wrote; pictures and nnU-Net's own results are left out."""
    if file.parts[0] == "nnUNet_results":
        return "cfcl" in str(file.parent) and file.suffix in (".json", ".jsonl", ".md", ".npz", ".pth")
    if file.name in ("lock", "dataset_fingerprint.json", "nnUNetPlans.json"):
        return False
    # names of training cases and their masks come from the preprocessed data; properties hold places of the foreground
    if file.parent.name == "nnUNetPlans_2d" and file.suffix == ".pkl":
        splits = json.loads(Path("nnUNet_preprocessed", DATASET, "splits_final.json").read_text())
        return file.stem in splits[0]["train"]
    return file.parent.name not in ("imagesTr", "labelsTr", "gt_segmentations")


def write_raw(raw: Path) -> None:
    """Discs of two brightnesses as of two scanners; a pool, two of whose images have a silver label."""
    for folder in ("imagesTr", "labelsTr", "imagesUn", "labelsSilver"):
        (raw / folder).mkdir()
    rows = []
    for number in range(TRAINING + POOL):
        random, pooled = np.random.default_rng(number), number >= TRAINING
        y, x = np.mgrid[:SIDE, :SIDE]
        disc = np.hypot(y - random.uniform(12, 20), x - random.uniform(12, 20)) < random.uniform(6, 9)
        image = 60 + 60 * (number % 2) + 80 * disc + random.normal(0, 8, disc.shape)
        case = f"tiny_{number:02d}"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
            raw / ("imagesUn" if pooled else "imagesTr") / f"{case}_0000.png")
        if number < TRAINING + POOL // 2:
            labels = raw / ("labelsSilver" if pooled else "labelsTr")
            Image.fromarray(disc.astype(np.uint8)).save(labels / f"{case}.png")
        rows.append([case, "AB"[number % 2], f"p{number}"])
    with open(raw / "attributes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["case", "scanner", "patient"], *rows])
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "grey"}, "labels": {"background": 0, "disc": 1}, "numTraining": TRAINING,
        "file_ending": ".png"}))


def write_settings(name: str, **changes: dict[str, object]) -> None:
    """A settings file: `SETTINGS`, changed section by section."""
    Path(name).write_text(json.dumps({key: {**part, **changes.get(key, {})} for key, part in SETTINGS.items()}))


def shorten_plan(folder: Path, stages: int, name: str) -> None:
    """Write nnU-Net's own plan with a very small network."""
    plan = json.loads((folder / "nnUNetPlans.json").read_text())
    plan["plans_name"] = name
    configuration = plan["configurations"]["2d"]
    arguments = configuration["architecture"]["arch_kwargs"]
    for key, value in arguments.items():
        if isinstance(value, list) and len(value) == arguments["n_stages"]:
            arguments[key] = value[:stages]
    arguments.update(n_stages=stages, features_per_stage=[4, 8, 8][:stages], n_conv_per_stage=[1] * stages,
                     n_conv_per_stage_decoder=[1] * (stages - 1))
    configuration["batch_size"] = 2
    (folder / f"{name}.json").write_text(json.dumps(plan))


def run(*command: str, until: str = "", settings: str = "settings.json") -> None:
    """A command, as a user types it; killed as soon as it prints ``until`` and has written the epoch's checkpoint."""
    own = {"nnUNet_cfcl_config": settings, "nnUNet_extTrainer": str(Path(nnunet_cfcl.__file__).parents[1] / "trainers"),
           # the planner takes this for its number of threads
           "nnUNet_n_proc_DA": "1" if "plan" in command[0] else "0", "nnUNet_def_n_proc": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env={**os.environ, **{name: name for name in FOLDERS}, **own}, text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if until and until in line:
            time.sleep(0.3)
            process.kill()
    assert (until in output) if until else process.wait() == 0, f"{command}:\n{output}"


def write_shim() -> None:
    """The files of `nnunet_cfcl install`, in a folder of their own."""
    from nnunet_cfcl.nnunet import installation

    Path("shim").mkdir()
    installation.shim_folder = lambda: Path("shim/nnunet_cfcl_plugin")
    installation.install()


if __name__ == "__main__":
    main()
    shutil.rmtree("__pycache__", ignore_errors=True)
