"""The pages' own commands, run: their text is taken from the page, placeholders are filled in, sizes made small."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.docs.pages import ROOT, SHELLS, blocks, inline_code

README, DOCS = ROOT / "README.md", ROOT / "docs"
DATASET, FOLD = "Dataset900_Phantom2D", "nnUNetTrainerDVDCL__nnUNetPlans__2d/fold_0"
TRUTH = f"$nnUNet_raw/{DATASET}"
#: The settings that the page asks for, so small that they teach nothing; the last section only saves time.
TINY = {
    "pretrain": {"epochs": 1, "iterations_per_epoch": 2, "images_per_step": 2, "points_per_image": 50},
    "finetune": {"epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1},
    "chromap": {"reducer": "pca", "samples": 500},
}
ON_CPU = {"-tr nnUNetTrainerDVDCL": "-tr nnUNetTrainerDVDCL -device cpu"}


@dataclass
class Walk:
    """A folder in which the commands of a page are typed, one after the other."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
        return {**kept, **few, "PATH": path}

    def type(self, script: str, **variables: str) -> str:
        """What the commands say; they all must end well."""
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=self.folder, text=True, timeout=900,
                              env={**self.environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout[-4000:]}"
        return done.stdout

    def again(self, script: str) -> str:
        """In another shell, with the exports of the first page."""
        folders = {f"nnUNet_{name}": str(self.folder / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
        return self.type(script, **folders, nnUNet_cfcl_config=str(self.folder / "settings.json"))

    def fold(self, *names: str) -> Path:
        return self.folder.joinpath("nnUNet_results", DATASET, FOLD, *names)


def shell(page: Path, holds: str = "") -> str:
    """The page's shell blocks, or those in which something stands, without what installs packages."""
    found = [block.text for block in blocks(page.read_text(encoding="utf-8"))
             if block.language in SHELLS and holds in block.text]
    assert found, f"{page} has no shell block with {holds!r}"
    return "\n".join(line for text in found for line in text.splitlines() if not line.startswith("pip "))


def filled_in(text: str, replacements: Mapping[str, str]) -> str:
    """The text with every placeholder filled in; each must be there."""
    for placeholder, value in replacements.items():
        assert placeholder in text, f"{placeholder!r} is not in\n{text}"
        text = text.replace(placeholder, value)
    return text


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    """After all commands of docs/getting-started.md."""
    walk, page = Walk(tmp_path_factory.mktemp("walk")), DOCS / "getting-started.md"
    settings, = [json.loads(one.text) for one in blocks(page.read_text(encoding="utf-8")) if one.language == "json"]
    tiny = {section: {**settings.get(section, {}), **TINY.get(section, {})} for section in {**settings, **TINY}}
    assert "as `settings.json`" in page.read_text(encoding="utf-8")
    (walk.folder / "settings.json").write_text(json.dumps(tiny))
    # every process takes seconds to start
    walk.type(filled_in(shell(page), {
        "--patients 40 --test-patients 20": "--patients 6 --test-patients 2 --shape 48 48",
        "-np 2 -npfp 2": "-np 1 -npfp 1", "nnUNetv2_train": "nnUNet_n_proc_DA=0 nnUNetv2_train",
        "-o predictions": "-o predictions -npp 0 -nps 0", "-o measured": "-o measured -np 1"}))
    return walk


@pytest.mark.end_to_end
def test_getting_started_leads_to_masks_and_figures_of_both_scanners(walk):
    assert all(walk.fold("cfcl", "pretraining", name).is_file() for name in ("views.png", "progress.png", "log.jsonl"))
    assert walk.fold("checkpoint_final.pth").is_file()
    assert len(list((walk.folder / "predictions").glob("*.png"))) == 2
    figures = (walk.folder / "measured" / "metrics.md").read_text()
    assert "By scanner" in figures and "| A |" in figures and "| B |" in figures


@pytest.mark.end_to_end
def test_the_page_of_file_formats_names_every_file_and_key_that_a_training_leaves(walk):
    page = DOCS / "reference" / "file-formats.md"
    named = {name for code in inline_code(page) for name in (code, code.split(" (")[0], Path(code).name)}
    left = {file.name for file in walk.fold("cfcl").rglob("*") if file.is_file()}
    keys = set(json.loads(walk.fold("cfcl", "config.json").read_text()))
    pretraining = walk.fold("cfcl", "pretraining")
    keys |= set(json.loads((pretraining / "log.jsonl").read_text().splitlines()[0]))
    keys |= set(torch.load(pretraining / "checkpoint_final.pth", weights_only=False))
    with np.load(walk.fold("cfcl", "chromap_space.npz")) as space:
        keys |= set(space.files)
    assert len(left) == 6 and left | keys <= named, (left | keys) - named


@pytest.mark.end_to_end
def test_the_commands_of_the_readme_train(walk):
    before = walk.fold("checkpoint_final.pth").stat().st_mtime
    output = walk.again(filled_in(shell(README, "nnUNetv2_train"), {
        "DATASET": "900", "3d_fullres": "2d", "nnUNetv2_train": "nnUNet_n_proc_DA=0 nnUNetv2_train", **ON_CPU}))
    assert "Phase 1" in output and walk.fold("checkpoint_final.pth").stat().st_mtime > before


@pytest.mark.end_to_end
@pytest.mark.nightly
def test_the_first_pages_table_names_commands_that_evaluate_and_check(walk):
    code = {code.split()[1]: code for code in inline_code(DOCS / "index.md") if code.startswith("nnunet_cfcl ")}
    walk.again(filled_in(code["evaluate"], {
        "-p PREDICTIONS": "-p predictions", "-g TRUTH": f"-g {TRUTH}/labelsTs", "-o DIR": "-o readme",
        "attributes.csv": f"{TRUTH}/attributes.csv"}))
    assert (walk.folder / "readme" / "metrics.md").is_file()
    export = "export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)"
    output = walk.again(f"{export}\n" + filled_in(code["doctor"], {
        "DATASET": "900", "-c CONFIGURATION": "-c 2d", "TRAINER": "nnUNetTrainerDVDCL -device cpu"}))
    assert "FAIL" not in output


HOW_TO = {
    "existing-installation.md": ("nnunet_cfcl doctor -tr", {
        "DATASET": "900", "3d_fullres": "2d", **ON_CPU}, []),
    "chromap.md": ("nnUNet_cfcl_chromap=1", {
        "IMAGES": f"{TRUTH}/imagesTs", "OUT": "maps", "DATASET": "900", "CONFIGURATION": "2d", **ON_CPU},
        ["maps/chromap/summary.json"]),
    "share-a-model.md": ("export-stock", {
        "nnUNet_results/DATASET/nnUNetTrainerDVDCL__nnUNetPlans__3d_fullres": f"nnUNet_results/{DATASET}/"
        "nnUNetTrainerDVDCL__nnUNetPlans__2d", " OUT": " exported", "IMAGES": f"{TRUTH}/imagesTs",
        "PREDICTIONS": "by_the_stock_model", "-f 0": "-f 0 -device cpu"}, ["by_the_stock_model/dataset.json"]),
    "unlabelled-and-silver.md": ("nnunet_cfcl pool", {
        "-d 4 -c 3d_fullres -np 8": "-d 900 -c 2d -np 1",
        "nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerSDVDCL":
            "nnUNetv2_train 900 2d 0 -tr nnUNetTrainerSDVDCL -device cpu"},
        [f"nnUNet_preprocessed/{DATASET}/nnUNetPlans_2d_cfcl_pool.json"]),
    "own-trainer.md": ("-tr Mine", {
        "/path/to/my_trainers": "$PWD/my_trainers", "DATASET 3d_fullres 0": "900 2d 0",
        "-tr Mine": "-tr Mine -device cpu"},
        [f"nnUNet_results/{DATASET}/Mine__nnUNetPlans__2d/fold_0/checkpoint_final.pth"]),
}


def _prepare(page: str, walk: Walk) -> None:
    """What the page says must be there before its commands."""
    if page == "own-trainer.md":
        code, = [one.text for one in blocks((DOCS / "how-to" / page).read_text()) if one.language == "python"]
        (walk.folder / "my_trainers").mkdir()
        (walk.folder / "my_trainers" / "mine.py").write_text(code)
    if page == "unlabelled-and-silver.md":
        raw = walk.folder / "nnUNet_raw" / DATASET
        (raw / "imagesUn").mkdir()
        for image in (raw / "imagesTs").iterdir():
            (raw / "imagesUn" / image.name).write_bytes(image.read_bytes())


@pytest.mark.end_to_end
@pytest.mark.nightly
@pytest.mark.parametrize("page", HOW_TO)
def test_the_first_commands_of_a_how_to_page_do_what_they_say(page, walk):
    holds, replacements, left = HOW_TO[page]
    _prepare(page, walk)
    text = (DOCS / "how-to" / page).read_text(encoding="utf-8")
    script, = [one.text for one in blocks(text) if one.language in (*SHELLS, "") and holds in one.text]
    walk.again(f"export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)\n{filled_in(script, replacements)}")
    assert all((walk.folder / name).is_file() for name in left)


def _stand_in(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("program", ["nnUNetv2_train DATASET", "srun torchrun"])
def test_the_signal_before_the_end_of_its_time_queues_a_slurm_job_again(program, tmp_path):
    script, = [one.text for one in blocks((DOCS / "how-to" / "several-gpus.md").read_text(encoding="utf-8"))
               if "#SBATCH" in one.text and program in one.text]
    asked, work = tmp_path / "asked", "echo yes > started; exec sleep 60"
    _stand_in(tmp_path, "scontrol", f'[ "$1" = show ] && echo node1 || echo "$@" >> {asked}')
    for name in ("srun", "nnUNetv2_train"):
        _stand_in(tmp_path, name, work)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NNODES": "4"}
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, start_new_session=True,
                           env={**os.environ, **slurm, "PATH": path})
    try:
        _wait_for(tmp_path / "started")
        assert not asked.exists()
        job.send_signal(signal.SIGUSR1)
        _wait_for(asked)
        assert asked.read_text() == "requeue 42\n"
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline, f"{file.name} has not come"
        time.sleep(0.05)
