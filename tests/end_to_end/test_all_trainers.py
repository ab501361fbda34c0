"""Every trainer trains both phases on real images: with a pool and silver labels in 2d, with manual labels in 3d."""

import csv
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image

from nnunet_cfcl import trainers

pytestmark = pytest.mark.end_to_end

PLANS = "shortPlans"
X_RAYS, VOLUMES = "Dataset012_ChestXraysPool", "Dataset004_Hippocampus"
ALL = {name: getattr(trainers, name) for name in trainers.__all__ if name.startswith("nnUNetTrainer")}
PRETRAINED = {name: trainer for name, trainer in ALL.items() if hasattr(trainer, "method")}
# DVD-CL is trained by the command in test_train_2d and test_train_3d, MVD-CL in test_pool_and_silver, S-DVD-CL in
# test_nnunet_features; all by the command, and on volumes too, in the nightly test
BY_COMMAND = ["nnUNetTrainerSMVDCL"]
TRAINED_PARTS = {
    "decoder": {"encoder", "decoder"}, "encoder": {"encoder"}, "segmentation": {"encoder", "decoder", "heads"},
}
# far more than the weight decay of a shortened phase 1 changes, far less than its steps do
MOVED = 1e-4


def _command(dataset: str, trainer: str) -> list[str]:
    configuration = "2d" if dataset == X_RAYS else "3d_fullres"
    return ["nnUNetv2_train", dataset[7:10], configuration, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu"]


@pytest.fixture
def make_x_ray_trainer(trainers_of, chest_xrays_with_pool):
    return trainers_of(chest_xrays_with_pool, X_RAYS, "2d")


def _pool_without_validation_patients(nnunet, validation: list[str]) -> set[str]:
    raw = nnunet.folder("raw") / X_RAYS
    with open(raw / "attributes.csv") as file:
        patients = {row["case"]: row["patient"] for row in csv.DictReader(file)}
    pool = {file.name.removesuffix("_0000.png") for file in (raw / "imagesUn").iterdir()}
    kept = {case for case in pool if patients[case] not in {patients[other] for other in validation}}
    assert len(pool) == 16 and len(kept) == 15, "one image of the pool is of a validation patient"
    return kept


def _moved(before: dict, after: dict) -> set[str]:
    """The parts of the network whose weights differ by more than weight decay explains."""
    parts = {}
    for key in after:
        part = "heads" if ".seg_layers." in key else key.partition(".")[0]
        if ".encoder." not in key:  # the decoder lists its encoder's weights again
            parts[part] = max(parts.get(part, 0.0), float((after[key] - before[key]).abs().max()))
    return {part for part, difference in parts.items() if difference > MOVED}


def _load(file: Path) -> dict:
    return torch.load(file, map_location="cpu", weights_only=False)


def _check_phase_1(fold: Path, trainer: type, cases: set[str], make) -> None:
    """Finite curves; exactly the method's part of the network trained, on exactly these cases; weights for stock."""
    lines = [json.loads(line) for line in (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    config = json.loads((fold / "cfcl/config.json").read_text())
    assert config["method"] == config["pretraining"]["objective"] == trainer.method.name
    assert set(config["pretraining"]["cases"]) == cases
    assert (fold / "cfcl/pretraining/views.png").exists() and (fold / "cfcl/pretraining/progress.png").exists()
    untrained = make(trainer)
    untrained.initialize()
    weights = fold / "cfcl/pretraining/checkpoint_final.pth"
    found = _moved(untrained.network.state_dict(), _load(weights)["network_weights"])
    assert found == TRAINED_PARTS[trainer.method.tap]
    maybe_load_checkpoint(make(nnUNetTrainer), False, False, str(weights))


def _check_phase_2(fold: Path) -> None:
    """Finite curves, and a network that is no longer the one that phase 1 left."""
    content = _load(fold / "checkpoint_final.pth")
    curves = content["logging"]
    assert len(curves["train_losses"]) == 2
    assert np.isfinite([*curves["train_losses"], *curves["val_losses"]]).all()
    assert all(torch.isfinite(value).all() for value in content["network_weights"].values())
    if (weights := fold / "cfcl/pretraining/checkpoint_final.pth").exists():
        before = _load(weights)["network_weights"]
        after = {key: value for key, value in content["network_weights"].items() if key in before}
        assert _moved(before, after) >= {"encoder", "decoder"}


def _log(fold: Path) -> str:
    return "".join(file.read_text() for file in fold.glob("training_log_*.txt"))


@pytest.mark.parametrize("name", BY_COMMAND)
def test_the_stock_command_trains_each_objective_on_x_rays_with_a_pool(chest_xrays_with_pool, make_x_ray_trainer, name):
    nnunet = chest_xrays_with_pool
    nnunet.settings()
    # the validation that follows is nnU-Net's own; the nightly runs go through it
    output = nnunet.run_until("Training done", *_command(X_RAYS, name))
    fold, split = nnunet.fold(X_RAYS, "2d", name), nnunet.split(X_RAYS)
    assert f"Phase 1: {ALL[name].method.name} pretraining" in output
    assert "8 training cases and 15 cases of the pool (1 left out: same patient as a validation case)" in output
    assert ("labels: 8 manual, 15 silver" in output) == ALL[name].method.needs_labels
    cases = {*split["train"], *_pool_without_validation_patients(nnunet, split["val"])}
    _check_phase_1(fold, ALL[name], cases, make_x_ray_trainer)
    _check_phase_2(fold)


@pytest.mark.parametrize("name", sorted(set(PRETRAINED) - set(BY_COMMAND)))
def test_every_other_method_trains_on_x_rays_with_a_pool(chest_xrays_with_pool, make_x_ray_trainer, name):
    split = chest_xrays_with_pool.split(X_RAYS)
    trainer = make_x_ray_trainer(ALL[name], pretrain={"epochs": 2}, finetune={"epochs": 2})
    trainer.run_training()
    fold = Path(trainer.output_folder)
    cases = {*split["train"], *_pool_without_validation_patients(chest_xrays_with_pool, split["val"])}
    _check_phase_1(fold, ALL[name], cases, make_x_ray_trainer)
    _check_phase_2(fold)
    assert ("labels: 8 manual, 15 silver" in _log(fold)) == ALL[name].method.needs_labels


def test_the_trainer_without_pretraining_only_fine_tunes(make_x_ray_trainer):
    trainer = make_x_ray_trainer(ALL["nnUNetTrainerCFCLScratch"], finetune={"epochs": 2})
    trainer.run_training()
    fold = Path(trainer.output_folder)
    _check_phase_2(fold)
    # its settings and the colours of its CHRO-maps are all that it leaves there
    assert {file.name for file in (fold / "cfcl").iterdir()} == {"chromap_space.npz", "config.json"}
    assert json.loads((fold / "cfcl" / "config.json").read_text())["method"] == "none" and "Phase 1" not in _log(fold)


@pytest.mark.parametrize("name", ["nnUNetTrainerMVDCL", "nnUNetTrainerSMVDCL"])
def test_multi_view_methods_train_on_volumes_the_supervised_one_with_manual_labels(hippocampus, make_trainer, name):
    short = {"epochs": 2, "iterations_per_epoch": 1}
    trainer = make_trainer(
        ALL[name], pretrain=short, finetune={**short, "initial_lr": 0.01}, counterfactual={"count": 1}
    )
    trainer.run_training()
    fold = Path(trainer.output_folder)
    _check_phase_1(fold, ALL[name], set(hippocampus.split(VOLUMES)["train"]), make_trainer)
    _check_phase_2(fold)
    said = "there are no silver labels to use: the fold's 8 manual labels are used"
    assert (said in _log(fold)) == (name == "nnUNetTrainerSMVDCL")


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("nnUNetTrainerVADeR", {"rotation_deg": 0.0}),
        ("nnUNetTrainerSSDCL", {"rotation_deg": 0.0, "crop_fraction": [1.0, 1.0], "aspect_ratio": [1.0, 1.0]}),
    ],
)
def test_the_preset_trains_with_the_views_of_the_paper(make_x_ray_trainer, name, views):
    trainer = make_x_ray_trainer(ALL[name], preset="paper", views={"rotation_deg": 30})
    trainer.run_training()
    config = json.loads((Path(trainer.output_folder) / "cfcl/config.json").read_text())
    assert config["settings"]["views"].items() >= views.items()
    line = json.loads((trainer.pretraining_folder / "log.jsonl").read_text())
    assert np.isfinite(line["loss"]) and line["gradient_norm"] > 0


def test_each_option_of_the_contrast_trains_and_changes_the_loss(make_x_ray_trainer, tmp_path):
    options = [{}, {"learn_temperature": True}, {"hard_negatives": 2.0}, {"ignore_radius": 20.0}]
    lines = []
    for option in options:
        short = {"epochs": 1, "iterations_per_epoch": 1}
        trainer = make_x_ray_trainer(pretrain={"epochs": 1, **option}, finetune=short)
        trainer.run_training()
        lines.append(json.loads((trainer.pretraining_folder / "log.jsonl").read_text()))
        shutil.rmtree(tmp_path / X_RAYS)
    assert all(np.isfinite(list(line.values())).all() and line["gradient_norm"] > 0 for line in lines)
    assert ["temperature" in line for line in lines] == ["learn_temperature" in option for option in options]
    assert lines[1]["temperature"] != 0.1 and lines[1]["temperature"] == pytest.approx(0.1, rel=0.1)
    assert all(first["loss"] != second["loss"] for first, second in itertools.combinations(lines, 2))


def test_cases_below_the_quality_asked_for_are_pretrained_without_their_labels(
    chest_xrays_with_pool, trainers_of, run_here, tmp_path
):
    nnunet = chest_xrays_with_pool.copy(tmp_path / "copy")
    silver = nnunet.folder("raw") / X_RAYS / "labelsSilver"
    cases = sorted(_pool_without_validation_patients(nnunet, nnunet.split(X_RAYS)["val"]))
    rows = [f"{case},{0.2 if number < 9 else 0.9}\n" for number, case in enumerate(cases)]
    (silver / "silver.csv").write_text("case,quality\n" + "".join(rows))
    output = run_here(nnunet, "nnunet_cfcl", "pool", "-d", "12", "-c", "2d", "-p", PLANS, "-np", "1")
    assert "mean quality 0.48 of the 15 given" in output
    trainer = trainers_of(nnunet, X_RAYS, "2d")(
        ALL["nnUNetTrainerSMVDCL"], pretrain={"epochs": 2, "images_per_step": 4}, silver={"min_quality": 0.5}
    )
    trainer.run_training()
    assert "labels: 8 manual, 6 silver (9 more are not used: quality below 0.5)" in _log(Path(trainer.output_folder))
    config = json.loads((Path(trainer.output_folder) / "cfcl/config.json").read_text())
    assert set(cases) <= set(config["pretraining"]["cases"])
    lines = [json.loads(line) for line in (trainer.pretraining_folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) and line["positives"] > 0.5 for line in lines)


@pytest.fixture
def datasets(request, chest_xrays_with_pool, hippocampus, tmp_path):
    """A dataset's own copy, so that nothing of other tests is reused."""
    source = {X_RAYS: chest_xrays_with_pool, VOLUMES: hippocampus}[request.param]
    nnunet = source.copy(tmp_path / "copy")
    nnunet.settings()
    return nnunet, request.param


def _prediction(nnunet, dataset: str, trainer: str) -> list[np.ndarray]:
    """Masks of two images, by the stock command."""
    images, masks = nnunet.root / "to_predict", nnunet.root / "predicted"
    images.mkdir()
    for image in sorted((nnunet.folder("raw") / dataset / "imagesTr").iterdir())[:2]:
        os.link(image, images / image.name)
    nnunet.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(masks), "-d", dataset[7:10], "-f", "0", "-tr", trainer,
        "-c", "2d" if dataset == X_RAYS else "3d_fullres", "-p", PLANS, "-device", "cpu", "-npp", "1", "-nps", "1",
    )
    if dataset == X_RAYS:
        return [np.asarray(Image.open(file)) for file in masks.glob("*.png")]
    return [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))) for file in masks.glob("*.nii.gz")]


@pytest.mark.nightly
@pytest.mark.parametrize("datasets", [X_RAYS, VOLUMES], indirect=True)
@pytest.mark.parametrize("name", sorted(ALL))
def test_the_stock_commands_train_and_predict_with_every_trainer(datasets, name):
    nnunet, dataset = datasets
    output = nnunet.run(*_command(dataset, name))
    assert "Mean Validation Dice" in output
    assert ("Phase 1: " in output) == (name in PRETRAINED)
    _check_phase_2(nnunet.fold(dataset, "2d" if dataset == X_RAYS else "3d_fullres", name))
    masks = _prediction(nnunet, dataset, name)
    assert len(masks) == 2 and all(mask.max() <= 2 for mask in masks)


@pytest.mark.nightly
@pytest.mark.parametrize("datasets", [X_RAYS, VOLUMES], indirect=True)
@pytest.mark.parametrize("name", [f"nnUNetTrainer{name}" for name in ("SMVDCL", "PixPro", "MAE", "SilverSeg")])
def test_a_run_killed_in_phase_1_goes_on_there_whatever_the_method_keeps(datasets, name):
    nnunet, dataset = datasets
    nnunet.settings(pretrain={"epochs": 3})
    nnunet.run_until("Pretraining epoch 1", *_command(dataset, name))
    output = nnunet.run(*_command(dataset, name), "--c")
    assert "Pretraining resumes after epoch" in output and "Pretraining epoch 0" not in output
    fold = nnunet.fold(dataset, "2d" if dataset == X_RAYS else "3d_fullres", name)
    lines = (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]
    _check_phase_2(fold)


@pytest.mark.nightly
def test_the_stock_trainers_command_takes_weights_of_a_supervised_pretraining(chest_xrays_with_pool, tmp_path):
    nnunet = chest_xrays_with_pool.copy(tmp_path / "copy")
    nnunet.settings()
    nnunet.run_until("Phase 2", *_command(X_RAYS, "nnUNetTrainerSilverSeg"))
    weights = nnunet.fold(X_RAYS, "2d", "nnUNetTrainerSilverSeg") / "cfcl/pretraining/checkpoint_final.pth"
    nnunet.variables["nnUNet_extTrainer"] = ""
    output = nnunet.run_until("Epoch 0", *_command(X_RAYS, "nnUNetTrainer"), "-pretrained_weights", str(weights))
    assert "Loading pretrained weights from file" in output and "Phase 1" not in output
