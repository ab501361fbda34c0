"""Files that commit 567510c wrote, the last before the package was divided into rooms, are read as its own code did.

`write.py` describes how they were made. The folders are copied, because the commands may write; nothing may be made
anew, or a hash has changed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import nnunet_cfcl.trainers
from nnunet_cfcl import cli
from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.cli import pretrain
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest
from tests.files_of_earlier_versions.write import (
    DATASET,
    FINE_TUNED,
    FINISHED,
    FOLDERS,
    INTERRUPTED,
    PLANS,
    POOL,
    THREE_STAGES,
)

WRITTEN = Path(__file__).parent / "written_by_567510c"
FOLD = Path("nnUNet_results", DATASET, f"{FINISHED}__{PLANS}__2d", "fold_0")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """A copy of all files, named by nnU-Net's variables."""
    for name in FOLDERS:
        shutil.copytree(WRITTEN / name, tmp_path / name)
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_cfcl_config", str(WRITTEN / "settings.json"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return tmp_path


@pytest.fixture
def without_raw_data(folders) -> Path:
    """The same without the raw dataset: attributes and patients are those kept beside the preprocessed data."""
    shutil.rmtree(folders / "nnUNet_raw" / DATASET)
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for locks."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def run_pretraining(trainer: str, capsys) -> str:
    assert pretrain.main(["7", "2d", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu"]) == 0
    return capsys.readouterr().out


def run_generator(verb: str, capsys) -> str:
    assert cli.main(["generator", verb, "-d", "7", "-c", "2d", "-p", PLANS, "-f", "0", "-device", "cpu"]) == 0
    return capsys.readouterr().out


def test_a_finished_pretraining_is_reused(folders, capsys):
    before = contents(folders / "nnUNet_results")
    output = run_pretraining(FINISHED, capsys)
    assert "checkpoint_final.pth is reused" in output and "Pretraining epoch" not in output
    assert {name: content for name, content in contents(folders / "nnUNet_results").items()
            if name.endswith((".pth", ".jsonl", ".npz"))} == {
        name: content for name, content in before.items() if name.endswith((".pth", ".jsonl", ".npz"))}


def test_its_settings_and_identity_are_recorded_as_before(folders, capsys):
    file, folder = folders / FOLD / "cfcl" / "config.json", FOLD / "cfcl" / "pretraining"
    recorded = json.loads(file.read_text())
    run_pretraining(FINISHED, capsys)
    found = json.loads(file.read_text())
    # sections of settings that this version did not have, and the hash of all settings
    for section in found["settings"].keys() - recorded["settings"].keys():
        del found["settings"][section]
    del found["settings_hash"], recorded["settings_hash"]
    assert found == {**recorded, "pretraining_folder": str(folders / folder)}


def test_an_interrupted_pretraining_on_the_pool_goes_on(folders, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_cfcl_config", str(WRITTEN / "settings_pool.json"))
    output = run_pretraining(INTERRUPTED, capsys)
    assert f"{POOL} cases of the pool" in output
    assert "Pretraining resumes after epoch 0" in output and "Pretraining epoch 0" not in output
    folder, = (folders / "nnUNet_results" / DATASET).glob(f"{INTERRUPTED}__{PLANS}__2d/cfcl_pool_*")
    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in content["network_weights"].values())
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_the_generator_and_the_gates_verdict_are_found(without_raw_data, capsys):
    generators = without_raw_data / "nnUNet_results" / DATASET / "cfcl_generators"
    before = contents(generators)
    output = run_generator("report", capsys)
    report, = generators.glob("*/report_*")
    assert "The generator was trained before" in output and "Gate, intervention 'scanner': " in output
    assert str(report) in output and contents(generators) == before


def test_the_store_of_counterfactuals_is_found_complete(without_raw_data, capsys):
    preprocessed = without_raw_data / "nnUNet_preprocessed"
    before = contents(preprocessed)
    output = run_generator("generate", capsys)
    folder, = preprocessed.glob(f"{DATASET}/*_cfcl_cf/*/")
    assert str(folder) in output and contents(preprocessed) == before
    store = CounterfactualStore.open(folder)
    cases = sorted(file.name.partition("__")[0] for file in (folder / "cases").iterdir())
    assert store.interventions == ("scanner",) and len(cases) > 2
    assert all(np.isfinite(store.read(case, "scanner")).all() for case in cases)


def test_the_manifest_of_the_pool_is_read():
    manifest = read_manifest(pool_folder(WRITTEN / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_2d"))
    assert manifest is not None and manifest.complete and len(manifest.cases) == POOL
    assert len(manifest.with_silver()) == POOL // 2


def test_the_colour_space_of_chro_maps_is_read():
    model = WRITTEN / "nnUNet_results" / DATASET / f"{FINE_TUNED}__{THREE_STAGES}__2d"
    space = ColorSpace.load(model / "fold_0" / "cfcl" / "chromap_space.npz")
    colours = space.transform(np.random.default_rng(0).normal(size=(20, space.features)).astype(np.float32))
    assert colours.shape == (20, 3) and colours.dtype == np.uint8 and colours.std() > 10


def test_a_shim_in_an_installation_of_nnunet_hands_the_trainers_out():
    spec = importlib.util.spec_from_file_location("trainer_shim", WRITTEN / "shim/nnunet_cfcl_plugin/trainer_shim.py")
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    assert FINISHED in shim.TRAINERS and getattr(shim, FINISHED) is nnunet_cfcl.trainers.nnUNetTrainerDVDCL


def test_no_file_names_the_machine_it_was_written_on():
    absolute = re.compile(rb"/(home|root|tmp|usr|opt|mnt|var)/\w|[\"' ]/\w+/\w")
    for name, content in contents(WRITTEN).items():
        assert not absolute.search(content), name
