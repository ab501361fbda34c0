"""Steps of the demo: a dataset, then nnU-Net's own commands in separate nnU-Net folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_cfcl.config import CONFIG_VARIABLE
from nnunet_cfcl.demo.picture import Example, draw_demo
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.installation import trainers_path
from nnunet_cfcl.phantom.dataset import write_phantom_dataset

TRAINER = "nnUNetTrainerDVDCL"
PLANS = "demoPlans"
CONFIGURATIONS = ("2d", "3d_fullres")
PHANTOM: dict[str, Any] = {
    "dataset_id": 900, "name": "Phantom3D", "dim": 3, "patients": 10, "test_patients": 4, "seed": 0,
    "shape": (32, 48, 48),
}
# gigabytes; a small target keeps patch and batch feasible on a CPU
MEMORY_TARGET = "2"
SETTINGS: dict[str, Any] = {
    "pretrain": {"epochs": 4, "iterations_per_epoch": 2, "images_per_step": 2, "points_per_image": 500},
    # training a generator on the phantom's attributes would take longer than the whole demo
    "counterfactual": {"count": 3, "source": "acquisition"},
    "finetune": {"epochs": 4, "iterations_per_epoch": 10, "val_iterations_per_epoch": 2, "mirror_axes": []},
}
SHOWN = re.compile(r"Pretraining epoch|Epoch \d+ *$|Pseudo dice|Mean Validation Dice|WARNING: the")
PREDICTED_CASES = 4


@dataclass(frozen=True)
class Commands:
    """Runner of commands of this environment in the demo's nnU-Net folders; their output goes to a log file.

    Attributes:
        folder: folder of the demo.
        environment: environment variables of the commands.
    """

    folder: Path
    environment: Mapping[str, str]

    def run(self, name: str, *arguments: str) -> None:
        """Run a console script of this environment and print its lines of progress.

        Raises:
            UserError: the command failed; the message has its last line and the log file.
        """
        log = self.folder / "log.txt"
        script = Path(sys.executable).with_name(name)
        command = [str(script) if script.exists() else name, *arguments]
        with open(log, "a") as file:
            file.write(f"\n$ {' '.join([name, *arguments])}\n")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(self.environment)
            )
            assert process.stdout is not None
            last = _follow(process.stdout, file)
        if process.wait() != 0:
            raise UserError(f"{name} {' '.join(arguments)} failed ({last})", f"read the whole output in {log}")


def _follow(lines: Iterable[str], file: Any) -> str:
    last = ""
    for line in lines:
        file.write(line)
        file.flush()
        last = line.strip() or last
        if SHOWN.search(line):
            # without nnU-Net's time stamp
            print(f"      {re.sub(r'^[0-9-]+ [0-9:.]+ *: *', '', line.strip())}", flush=True)
    return last


def run_demo(out: Path, raw: Path | None, device: str) -> Path:
    """Run all steps of the demo.

    Args:
        out: folder of all results; those of an earlier demo are replaced.
        raw: raw dataset, which is only read; None: synthetic patients.
        device: cpu or cuda.

    Returns:
        The plot of the results.

    Raises:
        UserError: ``raw`` is not a raw dataset, ``out`` is a folder of other content, or a command failed.
    """
    dataset = _prepare(out, raw)
    commands = Commands(out, _environment(out))
    number = dataset.name[7:10]
    with _step("planning and preprocessing (nnUNetv2_plan_and_preprocess)"):
        commands.run("nnUNetv2_plan_and_preprocess", "-d", number, "-gpu_memory_target", MEMORY_TARGET,
                     "-overwrite_plans_name", PLANS, "-c", *CONFIGURATIONS, "-np", "2")
    examples = []
    for configuration in _planned(out / "nnUNet_preprocessed" / dataset.name / f"{PLANS}.json"):
        with _step(f"{configuration}: pretraining and fine-tuning (nnUNetv2_train ... -tr {TRAINER})"):
            commands.run("nnUNetv2_train", number, configuration, "0", "-tr", TRAINER, "-p", PLANS, "-device", device)
        with _step(f"{configuration}: prediction (nnUNetv2_predict)"):
            images, labels = _images_to_predict(dataset, out)
            predictions = out / "predictions" / configuration
            commands.run("nnUNetv2_predict", "-i", str(images), "-o", str(predictions), "-d", number, "-f", "0",
                         "-c", configuration, "-tr", TRAINER, "-p", PLANS, "-device", device)
        model = out / "nnUNet_results" / dataset.name / f"{TRAINER}__{PLANS}__{configuration}" / "fold_0"
        examples.append(Example(configuration, model, images, labels, predictions))
    with _step("plotting"):
        picture = out / "demo.png"
        draw_demo(dataset, examples, picture)
    return picture


def _prepare(out: Path, raw: Path | None) -> Path:
    """Create the folders of the demo, with the raw dataset."""
    if raw is not None and not ((raw / "dataset.json").is_file() and re.match(r"Dataset\d{3}_", raw.resolve().name)):
        raise UserError(f"{raw} is not a raw dataset of nnU-Net, expected a folder DatasetXXX_Name with a dataset.json",
                        "correct the path after --raw")
    if out.exists() and any(out.iterdir()) and not (out / "settings.json").exists():
        raise UserError(f"{out} has content that is not of a demo, expected a new folder or that of an earlier demo",
                        "name another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (out / name).mkdir(parents=True)
    (out / "settings.json").write_text(json.dumps(SETTINGS, indent=2))
    if raw is not None:
        dataset = out / "nnUNet_raw" / raw.resolve().name
        dataset.symlink_to(raw.resolve(), target_is_directory=True)
        return dataset
    with _step("synthetic patients (nnunet_cfcl phantom)"):
        return write_phantom_dataset(out / "nnUNet_raw", **PHANTOM)


def _environment(out: Path) -> dict[str, str]:
    folders = {name: str((out / name).resolve()) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    defaults = {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2"}
    given = dict(os.environ)
    if given.get("nnUNet_n_proc_DA") == "0":  # nnU-Net's planner fails with 0
        del given["nnUNet_n_proc_DA"]
    return {
        **defaults, **given, **folders,
        CONFIG_VARIABLE: str((out / "settings.json").resolve()),
        "nnUNet_extTrainer": str(trainers_path()),
        # progress lines must arrive through the pipe at once
        "PYTHONUNBUFFERED": "1",
    }


def _planned(plans: Path) -> list[str]:
    known = json.loads(plans.read_text())["configurations"]
    return [configuration for configuration in CONFIGURATIONS if configuration in known]


def _images_to_predict(dataset: Path, out: Path) -> tuple[Path, Path]:
    """Copy the images of a few test cases, else of the fold's validation cases.

    Returns:
        Folder of the images, and folder of their labels.
    """
    cases = sorted({file.name.rpartition("_")[0] for file in (dataset / "imagesTs").glob("*")})
    split = "Ts"
    if not cases or not all(list((dataset / "labelsTs").glob(f"{case}.*")) for case in cases):
        splits = json.loads((out / "nnUNet_preprocessed" / dataset.name / "splits_final.json").read_text())
        cases, split = splits[0]["val"], "Tr"
    folder = out / "images_to_predict"
    folder.mkdir(exist_ok=True)
    for case in cases[:PREDICTED_CASES]:
        for image in (dataset / f"images{split}").glob(f"{case}_[0-9][0-9][0-9][0-9].*"):
            shutil.copy(image, folder)
    return folder, dataset / f"labels{split}"


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(f"==> {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"    done in {time.perf_counter() - started:.0f} s", flush=True)
