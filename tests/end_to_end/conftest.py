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
from typing import Any

import pytest
import torch
from filelock import FileLock
from nnunetv2.utilities.crossval_split import generate_crossval_split
from PIL import Image

from nnunet_cfcl import cli
from nnunet_cfcl.nnunet.installation import trainers_path
from nnunet_cfcl.trainers import nnUNetTrainerDVDCL
from tests.planning import plan_and_preprocess

TRAINER = "nnUNetTrainerDVDCL"
PLANS = "shortPlans"
SHORT = {
    "pretrain": {"epochs": 2, "iterations_per_epoch": 2, "images_per_step": 2, "points_per_image": 100},
    # tests of the generator ask for it; elsewhere it would be trained for every table of attributes
    "counterfactual": {"count": 2, "source": "acquisition"},
    "finetune": {"epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "mirror_axes": []},
    # UMAP takes a quarter of a minute, most of it to compile itself
    "chromap": {"reducer": "pca", "samples": 2000},
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

    def settings(self, **changes: Any) -> None:
        """Write the settings file: `SHORT`, changed section by section."""
        merged = {**SHORT, **changes}
        for section in SHORT.keys() & changes.keys():
            merged[section] = {**SHORT[section], **changes[section]}
        file = self.root / "settings.json"
        file.write_text(json.dumps(merged))
        self.variables["nnUNet_cfcl_config"] = str(file)

    def load_in_main_process(self) -> None:
        """No data loading processes, which take seconds to start; `test_train_3d` has them."""
        self.variables["nnUNet_n_proc_DA"] = "0"

    def fold(
        self, dataset: str, configuration: str, trainer: str = TRAINER, plans: str = PLANS, number: int = 0
    ) -> Path:
        return self.folder("results") / dataset / f"{trainer}__{plans}__{configuration}" / f"fold_{number}"

    def split(self, dataset: str) -> dict[str, list[str]]:
        """Training and validation cases of fold 0, as nnU-Net draws them."""
        cases = sorted(f.stem for f in (self.folder("preprocessed") / dataset / "gt_segmentations").iterdir())
        return generate_crossval_split([case.removesuffix(".nii") for case in cases], seed=12345, n_splits=5)[0]

    def copy(self, root: Path, results: bool = False) -> NnUNet:
        """The raw and preprocessed data, and the results if wanted, in other folders, with the times of their files."""
        copied = NnUNet(root, dict(self.variables))
        for name in ("raw", "preprocessed", *(["results"] if results else [])):
            shutil.copytree(self.folder(name), copied.folder(name))
        copied.folder("results").mkdir(exist_ok=True)
        return copied


def preprocess(
    root: Path, dataset: str, write: Callable[[Path], None], configurations: list[str], batch_2d: int = 8
) -> NnUNet:
    """Write a raw dataset below ``root``, plan and preprocess it by nnU-Net's command, with a small network."""
    nnunet = NnUNet(root)
    for name in ("raw", "preprocessed", "results"):
        nnunet.folder(name).mkdir()
    (nnunet.folder("raw") / dataset).mkdir()
    write(nnunet.folder("raw") / dataset)
    # the planner takes the number of data loading processes for that of threads, which must not be 0
    plan_and_preprocess({dataset: configurations}, {**nnunet.environment, "nnUNet_n_proc_DA": "1"})
    shorten_plans(nnunet.folder("preprocessed") / dataset, batch_2d)
    return nnunet


@pytest.fixture(scope="session")
def built_once(tmp_path_factory) -> Callable[[str, Callable[[Path], NnUNet]], NnUNet]:
    """Factory: (name, function that builds below a folder) -> a copy of what was built, for this process alone.

    All processes of pytest-xdist share one build: whichever needs it first builds it, the others wait at the lock.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the folders of all processes

    def once(name: str, build: Callable[[Path], NnUNet]) -> NnUNet:
        root, done = shared / f"built_{name}", shared / f"built_{name}.json"
        with FileLock(shared / f"built_{name}.lock"):
            if not done.exists():
                shutil.rmtree(root, ignore_errors=True)  # left by a build that failed
                root.mkdir()
                done.write_text(json.dumps(build(root).variables))
        return NnUNet(root, json.loads(done.read_text())).copy(tmp_path_factory.mktemp(name), results=True)

    return once


def shorten_plans(folder: Path, batch_2d: int) -> None:
    """`PLANS`: nnU-Net's own plan with a quarter of the features and small batches, and a copy as 3d_lowres."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    for name, configuration in plans["configurations"].items():
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = [n // 4 for n in network["features_per_stage"]]
        configuration["batch_size"] = batch_2d if name == "2d" else 2
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
def hippocampus(built_once, real_images) -> NnUNet:
    """Ten real MR volumes, 2d and 3d_fullres."""
    write = _copy_hippocampus(real_images / "Dataset004_Hippocampus", 10)
    return built_once(
        "hippocampus", lambda root: preprocess(root, "Dataset004_Hippocampus", write, ["2d", "3d_fullres"]))


LUNGS = {"background": 0, "right lung": 1, "left lung": 2}


def _table_of_x_rays(real_images: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of the table, by scanner."""
    with open(real_images / "cxr" / "meta.csv") as file:
        rows = list(csv.DictReader(file))
    return {name: [row for row in rows if row["scanner"] == name] for name in ("eureka_cr", "philips_dr")}


def _write_x_rays(source: Path, raw: Path, folder: str, rows: list[dict[str, str]], smaller: int = 1) -> None:
    """The images of some rows, their sides divided by ``smaller``; of the training set masks and description too."""
    (raw / folder).mkdir()
    (raw / "labelsTr").mkdir(exist_ok=True)
    for case in [row["case_id"] for row in rows]:
        image, mask = (Image.open(source / "cxr" / name / f"{case}.png") for name in ("images", "masks"))
        image.reduce(smaller).save(raw / folder / f"{case}_0000.png")
        if folder == "imagesTr":
            mask.resize(image.reduce(smaller).size, Image.Resampling.NEAREST).save(raw / "labelsTr" / f"{case}.png")
    if folder == "imagesTr":
        (raw / "dataset.json").write_text(json.dumps(
            {"channel_names": {"0": "xray"}, "labels": LUNGS, "numTraining": len(rows), "file_ending": ".png"}
        ))


@pytest.fixture(scope="session")
def chest_xrays(built_once, real_images) -> NnUNet:
    """Sixteen real chest X-rays of one scanner with masks of both lungs; four more, of the other, to predict."""
    table = _table_of_x_rays(real_images)

    def write(raw: Path) -> None:
        _write_x_rays(real_images, raw, "imagesTr", table["eureka_cr"][:16])
        _write_x_rays(real_images, raw, "imagesTs", table["philips_dr"][:4])

    return built_once("chest_xrays", lambda root: preprocess(root, "Dataset010_ChestXrays", write, ["2d"], batch_2d=2))


def _write_attributes(raw: Path, training: list[dict[str, str]], pool: list[dict[str, str]]) -> None:
    """Names the first image of the pool as one of the patient of fold 0's first validation case."""
    validation = generate_crossval_split(sorted(row["case_id"] for row in training), seed=12345, n_splits=5)[0]["val"]
    patients = {row["case_id"]: row["patient_id"] for row in training + pool}
    patients[pool[0]["case_id"]] = patients[validation[0]]
    with open(raw / "attributes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "scanner", "patient", "disease", "sex"])
        for row in training + pool:
            case = row["case_id"]
            table.writerow([case, row["scanner"], patients[case], row["disease"], row["sex"]])


@pytest.fixture(scope="session")
def chest_xrays_with_pool(built_once, real_images) -> NnUNet:
    """Ten labelled chest X-rays of both scanners, their sides a quarter, and a preprocessed pool of 16 more; its silver
    labels, with probabilities, were made by an nnU-Net that was briefly trained on the ten."""
    table = _table_of_x_rays(real_images)
    training, pool = ([row for rows in table.values() for row in rows[part]] for part in (slice(5), slice(5, 13)))

    def write(raw: Path) -> None:
        _write_x_rays(real_images, raw, "imagesTr", training, smaller=4)
        _write_x_rays(real_images, raw, "imagesUn", pool, smaller=4)
        _write_attributes(raw, training, pool)

    def build(root: Path) -> NnUNet:
        nnunet = preprocess(root, "Dataset012_ChestXraysPool", write, ["2d"], batch_2d=4)
        _add_silver_labels(nnunet)
        return nnunet

    return built_once("chest_xrays_with_pool", build)


def _add_silver_labels(nnunet: NnUNet) -> None:
    """Train briefly from scratch, label the pool with the model, and preprocess the pool."""
    # and the silver labels are the same every time
    nnunet.load_in_main_process()
    nnunet.settings(finetune={
        "epochs": 1, "iterations_per_epoch": 80, "initial_lr": 0.05, "warmup_fraction": 0, "rotation_deg": 15,
    })
    trainer = ("-tr", "nnUNetTrainerCFCLScratch", "-p", PLANS, "-device", "cpu")
    nnunet.run_until("Training done", "nnUNetv2_train", "12", "2d", "0", *trainer)
    raw = nnunet.folder("raw") / "Dataset012_ChestXraysPool"
    nnunet.run(
        "nnUNetv2_predict", "-i", str(raw / "imagesUn"), "-o", str(raw / "labelsSilver"), "-d", "12", "-c", "2d",
        "-f", "0", "-npp", "0", "-nps", "0", "--save_probabilities", *trainer,
    )
    nnunet.run("nnunet_cfcl", "pool", "-d", "12", "-c", "2d", "-p", PLANS, "-np", "1")


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., str]:
    """Factory: (folders, command) -> the output of a command of ours, run in this process: one more takes seconds to
    import nnU-Net, for which the way to an error line is the same."""

    def run(nnunet: NnUNet, *command: str, status: int = 0) -> str:
        for variable, value in nnunet.environment.items():
            if variable.startswith("nnUNet"):
                monkeypatch.setenv(variable, value)
        assert command[0] == "nnunet_cfcl"
        capsys.readouterr()
        found = cli.main(command[1:])
        output = "".join(capsys.readouterr())
        assert found == status, f"{' '.join(command)} ended with {found}:\n{output[-4000:]}"
        return output

    return run


@pytest.fixture
def trainers_of(monkeypatch, tmp_path) -> Callable[[NnUNet, str, str], Callable[..., Any]]:
    """Factory of factories: (folders, dataset, configuration) -> a function that makes trainers in this process, which
    leave their results in the test's own folder."""

    def of(nnunet: NnUNet, dataset: str, usual: str) -> Callable[..., Any]:
        def make(
            trainer: Any = nnUNetTrainerDVDCL, configuration: str = usual, plan: Callable[[dict], None] | None = None,
            continues: bool = False, fold: int = 0, **settings: Any,
        ) -> Any:
            nnunet.settings(**{"pretrain": {"epochs": 1}, "finetune": {"epochs": 1}, **settings})
            for variable, value in nnunet.environment.items():
                if variable.startswith("nnUNet"):
                    monkeypatch.setenv(variable, value)
            monkeypatch.setenv("nnUNet_results", str(tmp_path))
            monkeypatch.setenv("nnUNet_n_proc_DA", "0")
            folder = nnunet.folder("preprocessed") / dataset
            plans = json.loads((folder / f"{PLANS}.json").read_text())
            if plan is not None:
                plan(plans["configurations"])
            plans["continue_training"] = continues
            description = json.loads((folder / "dataset.json").read_text())
            return trainer(plans, configuration, fold, description, torch.device("cpu"))

        return make

    return of


@pytest.fixture
def make_trainer(trainers_of, hippocampus) -> Callable[..., Any]:
    """Factory of trainers on the hippocampus; ``plan`` changes the plan, ``settings`` the settings file."""
    return trainers_of(hippocampus, "Dataset004_Hippocampus", "3d_fullres")
