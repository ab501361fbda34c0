"""Real volumes, 3d_fullres, nnU-Net's own commands: train, kill, resume, predict, hand the weights on."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.installation import trainers_path

pytestmark = pytest.mark.end_to_end

DATASET, TRAINER, PLANS = "Dataset004_Hippocampus", "nnUNetTrainerDVDCL", "shortPlans"
PREDICTED = 2


def _train(*extra: str, trainer: str = TRAINER) -> list[str]:
    return ["nnUNetv2_train", "4", "3d_fullres", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu", *extra]


def _epochs(fold: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()]


def _masks(folder: Path) -> dict[str, np.ndarray]:
    return {f.name: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(f))) for f in folder.glob("*.nii.gz")}


@pytest.fixture(scope="module")
def images(hippocampus) -> Path:
    """A few of the volumes, to predict."""
    folder = hippocampus.root / "to_predict"
    folder.mkdir(exist_ok=True)
    for image in sorted((hippocampus.folder("raw") / DATASET / "imagesTr").iterdir())[:PREDICTED]:
        if not (folder / image.name).exists():
            os.link(image, folder / image.name)
    return folder


@pytest.fixture(scope="module")
def trained(hippocampus) -> tuple[Path, list[str]]:
    """A fold killed with SIGKILL in phase 1 and in phase 2, resumed each time; with what the three commands printed."""
    hippocampus.settings(pretrain={"epochs": 3}, finetune={"epochs": 3})
    outputs = [
        hippocampus.run_until("Pretraining epoch 1", *_train()),
        hippocampus.run_until("Epoch 1", *_train("--c")),
        hippocampus.run(*_train("--c")),
    ]
    return hippocampus.fold(DATASET, "3d_fullres"), outputs


def test_a_run_killed_in_phase_1_goes_on_there(trained):
    fold, (first, second, _) = trained
    assert "Phase 1: DVD-CL pretraining" in first and "Pretraining epoch 0" in first
    assert "Pretraining resumes after epoch" in second
    assert "Pretraining epoch 0" not in second and "Pretraining epoch 2" in second and "Phase 2" in second
    assert _epochs(fold) == [0, 1, 2]


def test_a_run_killed_in_phase_2_goes_on_there(trained):
    fold, (_, _, third) = trained
    assert "Pretraining" not in third and "Phase 1" not in third
    assert "Epoch 0" not in third and "Epoch 1" in third and "Epoch 2" in third and "Training done." in third
    curves = torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]
    assert len(curves["train_losses"]) == 3 and np.isfinite(curves["train_losses"]).all()


def test_the_fold_holds_what_a_user_looks_for(trained):
    fold, _ = trained
    assert {f.name for f in (fold / "cfcl/pretraining").iterdir()} == {
        "checkpoint_final.pth", "log.jsonl", "progress.png", "views.png"
    }
    config = json.loads((fold / "cfcl/config.json").read_text())
    assert config["settings"]["pretrain"]["epochs"] == 3
    assert len(config["pretraining"]["cases"]) == 8
    signed = torch.load(fold / "checkpoint_final.pth", weights_only=False)["init_args"]["cfcl"]
    assert signed["settings"] == config["settings"]
    assert (fold / "validation/summary.json").exists()
    assert not list(fold.rglob("*.tmp"))


def test_validation_cases_are_not_pretrained_on(trained, hippocampus):
    fold, _ = trained
    cases = json.loads((fold / "cfcl/config.json").read_text())["pretraining"]["cases"]
    split = json.loads((hippocampus.folder("preprocessed") / DATASET / "splits_final.json").read_text())[0]
    assert cases == sorted(split["train"]) and not set(cases) & set(split["val"])


def test_stock_prediction_and_the_exported_stock_model_agree(trained, hippocampus, images):
    fold, _ = trained
    ours, stock, exported = (hippocampus.root / name for name in ("predicted", "predicted_stock", "exported"))
    hippocampus.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(ours), "-d", "4", "-c", "3d_fullres", "-f", "0",
        "-tr", TRAINER, "-p", PLANS, "-device", "cpu", "-npp", "0", "-nps", "0",
    )
    assert not (ours / "chromap").exists()
    hippocampus.run("nnunet_cfcl", "export-stock", str(fold), str(exported))
    hippocampus.variables["nnUNet_extTrainer"] = ""
    try:
        hippocampus.run(
            "nnUNetv2_predict_from_modelfolder", "-i", str(images), "-o", str(stock), "-m", str(exported), "-f", "0",
            "-device", "cpu", "-npp", "1", "-nps", "1",
        )
    finally:
        del hippocampus.variables["nnUNet_extTrainer"]
    found, expected = _masks(stock), _masks(ours)
    assert len(expected) == PREDICTED and found.keys() == expected.keys()
    assert all(np.array_equal(found[name], mask) for name, mask in expected.items())


def test_the_stock_trainer_takes_the_pretrained_weights_without_the_plugin(trained, hippocampus):
    """In a process that cannot import the plugin, by the function behind ``nnUNetv2_train -pretrained_weights``."""
    fold, _ = trained
    weights = fold / "cfcl/pretraining/checkpoint_final.pth"
    script = f"""
import sys
sys.modules["nnunet_cfcl"] = None
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
trainer = get_trainer_from_args("4", "3d_fullres", 0, "nnUNetTrainer", "{PLANS}", device=torch.device("cpu"))
maybe_load_checkpoint(trainer, False, False, {str(weights)!r})
given = torch.load({str(weights)!r}, weights_only=False)["network_weights"]
found = trainer.network.state_dict()
compared = [key for key in found if ".seg_layers." not in key]
assert compared and all(torch.equal(found[key], given[key]) for key in compared)
print("equal tensors:", len(compared))
"""
    assert "equal tensors: " in hippocampus.run("python", "-c", script)


@pytest.mark.nightly
def test_the_stock_command_starts_from_the_pretrained_weights(trained, hippocampus):
    fold, _ = trained
    weights = str(fold / "cfcl/pretraining/checkpoint_final.pth")
    hippocampus.variables["nnUNet_extTrainer"] = ""
    try:
        output = hippocampus.run_until("Epoch 0", *_train("-pretrained_weights", weights, trainer="nnUNetTrainer"))
    finally:
        del hippocampus.variables["nnUNet_extTrainer"]
    assert "Loading pretrained weights from file" in output and "Phase 1" not in output


def test_given_weights_skip_phase_1_also_when_continued(trained, hippocampus):
    fold, _ = trained
    weights = fold / "cfcl/pretraining/checkpoint_final.pth"
    hippocampus.settings(finetune={"epochs": 2})
    kept = fold.rename(fold.with_name("fold_kept"))
    try:
        given = _train("-pretrained_weights", str(kept / weights.relative_to(fold)))
        first = hippocampus.run_until("Epoch 0", *given)
        assert "Weights were given" in first and "Phase 1" not in first
        assert (fold / "cfcl/pretraining/skipped.json").exists()
        second = hippocampus.run_until("Epoch 1", *_train("--c"))
        assert "Phase 1" not in second and "Pretraining" not in second
    finally:
        fold.rename(fold.with_name("fold_given"))
        kept.rename(fold)


def test_a_finished_phase_1_is_reused_by_a_new_run_with_the_same_settings(trained, hippocampus):
    fold, _ = trained
    hippocampus.settings(pretrain={"epochs": 3}, finetune={"epochs": 1})
    before = (fold / "cfcl/pretraining/checkpoint_final.pth").read_bytes()
    output = hippocampus.run_until("Epoch 0", *_train())
    assert "is reused" in output and "Pretraining epoch" not in output
    assert (fold / "cfcl/pretraining/checkpoint_final.pth").read_bytes() == before
    assert (fold / "previous_checkpoint_final.pth").exists()


def test_an_unknown_setting_stops_the_trainer_before_any_training(make_trainer):
    with pytest.raises(UserError, match="unknown setting 'pretrain.epoch'.*'pretrain.epochs'"):
        make_trainer(pretrain={"epoch": 3})


def test_the_trainer_of_the_how_to_page_is_found_and_pretrained(hippocampus, tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "own-trainer.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code[1])
    hippocampus.settings()
    hippocampus.variables["nnUNet_extTrainer"] = f"{tmp_path}{os.pathsep}{trainers_path()}"
    try:
        output = hippocampus.run_until("Pretraining epoch 0", *_train(trainer="Mine"))
    finally:
        del hippocampus.variables["nnUNet_extTrainer"]
    assert "Phase 1: DVD-CL pretraining" in output
