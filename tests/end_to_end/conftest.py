"""Real images in nnU-Net's folders, planned and preprocessed once, and a way to run commands."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nnunet_cfcl.nnunet.installation import trainers_path

TRAINER = "nnUNetTrainerDVDCL"
PLANS = "shortPlans"
SHORT = {
    "pretrain": {"epochs": 2, "iterations_per_epoch": 2, "images_per_step": 2, "points_per_image": 100},
    "counterfactual": {"count": 2},
    "finetune": {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "mirror_axes": []},
}


@dataclass
class NnUNet:
    """nnU-Net's folders below one root, and its commands run in them as a user types them."""

    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        return self.root / f"nnUNet_{name}"

    @property
    def environment(self) -> dict[str, str]:
        scripts = Path(sys.executable).parent
        folders = {f"nnUNet_{name}": str(self.folder(name)) for name in ("raw", "preprocessed", "results")}
        own = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_extTrainer": str(trainers_path())}
        path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **own, **folders, "PATH": path, "PYTHONUNBUFFERED": "1", **self.variables}

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=self.root, start_new_session=True,
        )

    def run(self, *command: str, status: int = 0) -> str:
        """The output of a command that is expected to end with ``status``."""
        process = self.start(*command)
        output = process.communicate(timeout=900)[0]
        assert process.returncode == status, f"{' '.join(command)} ended with {process.returncode}:\n{output[-4000:]}"
        return output

    def run_until(self, line: str, *command: str) -> str:
        """Start a command and kill it, and all it started, with SIGKILL as soon as it prints ``line``."""
        process = self.start(*command)
        timer = threading.Timer(900, process.kill)
        timer.start()
        output = ""
        assert process.stdout is not None
        for text in process.stdout:
            output += text
            if line in text:
                os.killpg(process.pid, 9)
                break
        timer.cancel()
        process.wait()
        assert line in output, f"'{line}' was never printed:\n{output[-4000:]}"
        return output

    def settings(self, **changes: dict) -> None:
        """Write the settings file: `SHORT`, changed section by section."""
        merged = {name: {**SHORT.get(name, {}), **changes.get(name, {})} for name in {*SHORT, *changes}}
        file = self.root / "settings.json"
        file.write_text(json.dumps(merged))
        self.variables["nnUNet_cfcl_config"] = str(file)

    def fold(self, dataset: str, configuration: str, trainer: str = TRAINER, plans: str = PLANS) -> Path:
        return self.folder("results") / dataset / f"{trainer}__{plans}__{configuration}" / "fold_0"


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory) -> Callable[[str, Callable[[Path], None], list[str]], NnUNet]:
    """Factory: a raw dataset is written, planned and preprocessed by nnU-Net's command, with a small network."""

    def make(dataset: str, write: Callable[[Path], None], configurations: list[str]) -> NnUNet:
        nnunet = NnUNet(tmp_path_factory.mktemp(dataset))
        for name in ("raw", "preprocessed", "results"):
            nnunet.folder(name).mkdir()
        (nnunet.folder("raw") / dataset).mkdir()
        write(nnunet.folder("raw") / dataset)
        nnunet.run(
            "nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-c", *configurations, "-np", "1", "-npfp", "1",
            "--no_pbar",
        )
        shorten_plans(nnunet.folder("preprocessed") / dataset)
        return nnunet

    return make


def shorten_plans(folder: Path) -> None:
    """`PLANS`: nnU-Net's own plan with a quarter of the features and small batches, and a copy as 3d_lowres."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    for name, configuration in plans["configurations"].items():
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [n // 4 for n in network["features_per_stage"]]
        configuration["batch_size"] = 8 if name == "2d" else 2
    if "3d_fullres" in plans["configurations"]:
        plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres"}
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))


def _copy_hippocampus(source: Path, cases: int) -> Callable[[Path], None]:
    def write(raw: Path) -> None:
        chosen = sorted((source / "labelsTr").glob("*.nii.gz"))[:cases]
        for label in chosen:
            case = label.name.removesuffix(".nii.gz")
            for folder, file in (("labelsTr", label.name), ("imagesTr", f"{case}_0000.nii.gz")):
                (raw / folder).mkdir(exist_ok=True)
                shutil.copy(source / folder / file, raw / folder / file)
        description = json.loads((source / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(chosen)}))

    return write


@pytest.fixture(scope="session")
def real_images() -> Path:
    folder = Path(os.environ.get("CFCL_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set CFCL_TEST_DATA to a folder with them (README, 'Development')")
    return folder


@pytest.fixture(scope="session")
def hippocampus(preprocessed, real_images) -> NnUNet:
    """Ten real MR volumes, 2d and 3d_fullres."""
    source = real_images / "Dataset004_Hippocampus"
    return preprocessed("Dataset004_Hippocampus", _copy_hippocampus(source, 10), ["2d", "3d_fullres"])


@pytest.fixture(scope="session")
def chest_xrays(preprocessed, real_images) -> NnUNet:
    """Sixteen real chest X-rays of one scanner with masks of both lungs; four more, of the other, to predict."""
    source = real_images / "cxr"
    with open(source / "meta.csv") as file:
        rows = list(csv.DictReader(file))

    def write(raw: Path) -> None:
        for folder in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / folder).mkdir()
        training = [row["case_id"] for row in rows if row["scanner"] == "eureka_cr"][:16]
        for case in training:
            shutil.copy(source / "images" / f"{case}.png", raw / "imagesTr" / f"{case}_0000.png")
            shutil.copy(source / "masks" / f"{case}.png", raw / "labelsTr" / f"{case}.png")
        for case in [row["case_id"] for row in rows if row["scanner"] == "philips_dr"][:4]:
            shutil.copy(source / "images" / f"{case}.png", raw / "imagesTs" / f"{case}_0000.png")
        labels = {"background": 0, "right lung": 1, "left lung": 2}
        (raw / "dataset.json").write_text(json.dumps(
            {"channel_names": {"0": "xray"}, "labels": labels, "numTraining": 16, "file_ending": ".png"}
        ))

    return preprocessed("Dataset010_ChestXrays", write, ["2d"])
