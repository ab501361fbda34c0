"""What nnU-Net can do, with the plugin's trainers and nnU-Net's own commands: labels, channels, splits, stages, zips.

The list of all of it, with the tests elsewhere, is `tests.compatibility.features`.
"""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.end_to_end.conftest import PLANS, TRAINER, NnUNet, preprocess

pytestmark = pytest.mark.end_to_end

DATASET, SUPERVISED = "Dataset013_Regions", "nnUNetTrainerSDVDCL"
VOLUMES = "Dataset004_Hippocampus"
IGNORED = 3
# not nnU-Net's own split: it leaves two cases out
SPLIT = {"train": [f"case_{number}" for number in range(6)], "val": ["case_6", "case_7"]}


def _write(raw) -> None:
    """Ten pictures of 64 x 64 pixels with two channels: a disc in a disc, a stripe of which nobody has labelled."""
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir()
    y, x = np.mgrid[:64, :64]
    for number in range(10):
        random = np.random.default_rng(number)
        middle, radius = random.uniform(24, 40, 2), random.uniform(14, 18)
        distance = np.hypot(y - middle[0], x - middle[1])
        labels = (distance < radius).astype(np.uint8) + (distance < radius / 2)
        for channel, contrast in enumerate(([20, 120, 200], [180, 60, 100])):
            image = np.array(contrast)[labels] + random.normal(0, 10, labels.shape)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                raw / "imagesTr" / f"case_{number}_{channel:04d}.png")
        labels[30:34] = IGNORED
        Image.fromarray(labels).save(raw / "labelsTr" / f"case_{number}.png")
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "first", "1": "second"}, "numTraining": 10, "file_ending": ".png",
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": IGNORED}, "regions_class_order": [1, 2],
    }))


def _command(*more: str, fold: str = "0") -> list[str]:
    return ["nnUNetv2_train", "13", "2d", fold, "-tr", SUPERVISED, "-p", PLANS, "-device", "cpu", *more]


@pytest.fixture(scope="module")
def regions(tmp_path_factory) -> NnUNet:
    """Two channels, regions, an ignore label."""
    nnunet = preprocess(tmp_path_factory.mktemp(DATASET), DATASET, _write, ["2d"], batch_2d=2)
    nnunet.load_in_main_process()
    nnunet.settings()
    return nnunet


@pytest.fixture(scope="module")
def trained(regions):
    """Fold 0 of a split of one's own, validated with ``--npz``; and what the command printed."""
    (regions.folder("preprocessed") / DATASET / "splits_final.json").write_text(json.dumps([SPLIT]))
    output = regions.run(*_command("--npz"))
    return regions, regions.fold(DATASET, "2d", SUPERVISED), output


def _weights(file) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=False)["network_weights"]


def _masks(folder) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


def test_two_channels_regions_and_an_ignore_label_are_pretrained_and_trained(trained):
    _, fold, output = trained
    assert "Phase 1: S-DVD-CL" in output and "Mean Validation Dice" in output
    lines = [json.loads(line) for line in (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(np.isfinite(list(line.values())).all() for line in lines)
    weights = _weights(fold / "checkpoint_final.pth")
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2, "channels"
    assert len(weights["decoder.seg_layers.0.weight"]) == 2, "regions"


def test_splits_of_ones_own_decide_which_cases_are_pretrained_on_and_which_are_predicted(trained):
    _, fold, _ = trained
    config = json.loads((fold / "cfcl/config.json").read_text())
    assert config["pretraining"]["cases"] == SPLIT["train"]
    assert set(_masks(fold / "validation")) == {f"{case}.png" for case in SPLIT["val"]}


def test_npz_keeps_a_probability_for_every_region_and_no_mask_holds_the_ignore_label(trained):
    _, fold, _ = trained
    masks = _masks(fold / "validation")
    for case in SPLIT["val"]:
        probabilities = np.load(fold / "validation" / f"{case}.npz")["probabilities"]
        assert probabilities.shape == (2, 1, 64, 64) and 0 <= probabilities.min() <= probabilities.max() <= 1
        assert set(np.unique(masks[f"{case}.png"])) <= {0, 1, 2}


@pytest.mark.nightly
def test_val_best_validates_the_best_checkpoint_and_leaves_the_final_one_alone(trained):
    nnunet, fold, _ = trained
    best = torch.load(fold / "checkpoint_best.pth", map_location="cpu", weights_only=False)
    # a model whose masks cannot be taken for the final one's: every voxel is in both regions
    heads = [key for key in best["network_weights"] if ".seg_layers." in key]
    for key in heads:
        best["network_weights"][key].fill_(100.0 if key.endswith("bias") else 0.0)
    torch.save(best, fold / "checkpoint_best.pth")
    before = (fold / "checkpoint_final.pth").read_bytes()
    output = nnunet.run(*_command("--val", "--val_best", "--npz"))
    assert "Mean Validation Dice" in output and "Phase 1" not in output
    assert all((mask == 2).all() for mask in _masks(fold / "validation").values())
    assert (fold / "checkpoint_final.pth").read_bytes() == before


@pytest.mark.nightly
def test_a_model_exported_to_a_zip_predicts_the_same_masks_in_another_installation(trained, tmp_path):
    nnunet, fold, _ = trained
    zipped, images = tmp_path / "model.zip", tmp_path / "images"
    nnunet.run("nnUNetv2_export_model_to_zip", "-d", "13", "-o", str(zipped), "-c", "2d", "-f", "0", "-tr", SUPERVISED,
               "-p", PLANS)
    names = zipfile.ZipFile(zipped).namelist()
    assert any(name.endswith("fold_0/checkpoint_final.pth") for name in names)
    images.mkdir()
    for channel in range(2):
        name = f"case_8_{channel:04d}.png"
        os.link(nnunet.folder("raw") / DATASET / "imagesTr" / name, images / name)
    elsewhere = NnUNet(tmp_path / "elsewhere", dict(nnunet.variables))
    for name in ("raw", "preprocessed", "results"):
        elsewhere.folder(name).mkdir(parents=True)
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", str(zipped))
    assert (elsewhere.fold(DATASET, "2d", SUPERVISED) / "checkpoint_final.pth").read_bytes() == (
        fold / "checkpoint_final.pth").read_bytes()
    masks = []
    for where in (nnunet, elsewhere):
        where.run("nnUNetv2_predict", "-i", str(images), "-o", str(where.root / "masks"), "-d", "13", "-c", "2d", "-f",
                  "0", "-tr", SUPERVISED, "-p", PLANS, "-device", "cpu", "-npp", "1", "-nps", "1")
        masks.append(_masks(where.root / "masks"))
    assert list(masks[0]) == ["case_8.png"] == list(masks[1])
    assert np.array_equal(masks[0]["case_8.png"], masks[1]["case_8.png"])


@pytest.mark.nightly
def test_fold_all_is_pretrained_and_trained_on_every_case(regions):
    output = regions.run(*_command(fold="all"))
    assert "phase 1 has 10 training cases" in output and "Mean Validation Dice" in output
    fold = regions.fold(DATASET, "2d", SUPERVISED).with_name("fold_all")
    assert len(json.loads((fold / "cfcl/config.json").read_text())["pretraining"]["cases"]) == 10
    assert (fold / "checkpoint_final.pth").exists() and len(_masks(fold / "validation")) == 10


@pytest.mark.nightly
def test_a_plan_of_nnunets_planner_of_residual_encoders_is_pretrained_and_trained(regions):
    plans = "nnUNetResEncUNetMPlans"
    # nnU-Net's planner uses this number as its thread count and fails on 0
    regions.variables["nnUNet_n_proc_DA"] = "1"
    regions.run("nnUNetv2_plan_experiment", "-d", "13", "-pl", "nnUNetPlannerResEncM", "-gpu_memory_target", "1")
    regions.variables["nnUNet_n_proc_DA"] = "0"
    file = regions.folder("preprocessed") / DATASET / f"{plans}.json"
    plan = json.loads(file.read_text())
    two = plan["configurations"]["2d"]
    assert two["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
    # nnU-Net fills a GPU; the shapes of the network stay
    two["batch_size"] = 2
    file.write_text(json.dumps(plan))
    regions.run("nnUNetv2_preprocess", "-d", "13", "-plans_name", plans, "-c", "2d", "-np", "1")
    output = regions.run(*["nnUNetv2_train", "13", "2d", "0", "-tr", SUPERVISED, "-p", plans, "-device", "cpu"])
    assert "Phase 2" in output and "Mean Validation Dice" in output


def _make_cascade(nnunet: NnUNet) -> None:
    file = nnunet.folder("preprocessed") / VOLUMES / f"{PLANS}.json"
    plan = json.loads(file.read_text())
    plan["configurations"]["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    plan["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plan))


@pytest.mark.nightly
def test_a_cascades_first_stage_is_pretrained_and_its_second_trained_once_pretraining_is_switched_off(
    hippocampus, tmp_path
):
    nnunet = hippocampus.copy(tmp_path / "copy")
    _make_cascade(nnunet)
    nnunet.settings()
    usual = ("-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    # fold "all" predicts every case for the second stage, as the five folds together do
    assert "Phase 2" in nnunet.run("nnUNetv2_train", "4", "3d_lowres", "all", *usual)
    refused = nnunet.run("nnUNetv2_train", "4", "3d_cascade_fullres", "0", *usual, status=1)
    assert "pretrain 3d_lowres" in refused and "pretrain.enabled set to false" in refused
    assert "Epoch 0" not in refused
    nnunet.settings(pretrain={"enabled": False}, finetune={"acquisition_probability": 0.5})
    output = nnunet.run("nnUNetv2_train", "4", "3d_cascade_fullres", "0", *usual)
    assert "Phase 1" not in output and "Mean Validation Dice" in output
    assert "training images are replaced with probability 0.5" in output
    images = tmp_path / "images"
    images.mkdir()
    image = sorted((nnunet.folder("raw") / VOLUMES / "imagesTr").iterdir())[0]
    os.link(image, images / image.name)
    predict = ("nnUNetv2_predict", "-i", str(images), "-d", "4", "-npp", "1", "-nps", "1", *usual)
    nnunet.run(*predict, "-o", str(tmp_path / "first"), "-c", "3d_lowres", "-f", "all")
    nnunet.variables["nnUNet_cfcl_chromap"] = "1"
    nnunet.run(*predict, "-o", str(tmp_path / "second"), "-c", "3d_cascade_fullres", "-f", "0",
               "-prev_stage_predictions", str(tmp_path / "first"))
    assert len(list((tmp_path / "second").glob("*.nii.gz"))) == 1
    assert len(list((tmp_path / "second" / "chromap").glob("*.png"))) == 1
