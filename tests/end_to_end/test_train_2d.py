"""2d on slices of real volumes, in this process, and on real chest X-rays, by nnU-Net's own commands and ours."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.end_to_end

TRAINER, PLANS = "nnUNetTrainerDVDCL", "shortPlans"


def test_2d_trains_on_slices_of_real_volumes(make_trainer):
    trainer = make_trainer(configuration="2d")
    trainer.run_training()
    assert (trainer.pretraining_folder / "checkpoint_final.pth").exists()
    assert all(torch.isfinite(value).all() for value in trainer.network.state_dict().values())


@pytest.fixture(scope="module")
def trained(chest_xrays):
    """A briefly trained model of X-rays, and what the command printed."""
    chest_xrays.settings()
    chest_xrays.load_in_main_process()
    output = chest_xrays.run("nnUNetv2_train", "10", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    return chest_xrays, output


def test_2d_trains_on_real_chest_x_rays_and_predicts_those_of_another_scanner(trained):
    chest_xrays, output = trained
    assert "Pretraining epoch 1" in output and "Mean Validation Dice" in output
    images, predicted = chest_xrays.folder("raw") / "Dataset010_ChestXrays" / "imagesTs", chest_xrays.root / "predicted"
    chest_xrays.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(predicted), "-d", "10", "-c", "2d", "-f", "0", "-tr", TRAINER,
        "-p", PLANS, "-device", "cpu", "-npp", "0", "-nps", "0",
    )
    masks = [np.asarray(Image.open(file)) for file in sorted(predicted.glob("*.png"))]
    assert len(masks) == 4 and all(mask.shape == (256, 256) and mask.max() <= 2 for mask in masks)


def test_x_rays_are_mapped_in_their_own_pixels_without_masks(trained, tmp_path):
    chest_xrays, _ = trained
    model = chest_xrays.fold("Dataset010_ChestXrays", "2d").parent
    images, out = chest_xrays.folder("raw") / "Dataset010_ChestXrays/imagesTs", tmp_path / "maps"
    output = chest_xrays.run(
        "nnunet_cfcl", "chromap", "-i", str(images), "-o", str(out), "-m", str(model), "-device", "cpu")
    assert "CHRO-maps of 4 cases" in output
    assert [file.name for file in out.iterdir()] == ["chromap"]
    for file in images.iterdir():
        drawn = np.asarray(Image.open(out / "chromap" / file.name.replace("_0000", "")))
        grey = np.asarray(Image.open(file)).astype(float)
        assert drawn.shape == (*grey.shape, 3)
        assert np.corrcoef(drawn.mean(-1).ravel(), grey.ravel())[0, 1] > 0.5  # the image shows through
    summary = json.loads((out / "chromap/summary.json").read_text())
    assert len(summary["cases"]) == 4 and summary["color_space"]["reducer"] == "pca"


def test_the_doctor_finds_the_installation_and_the_data_in_order(chest_xrays):
    chest_xrays.settings()
    output = chest_xrays.run(
        "nnunet_cfcl", "doctor", "-d", "10", "-c", "2d", "-p", PLANS, "-tr", TRAINER, "-device", "cpu", "--data"
    )
    assert "FAIL" not in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "10", "-c", "2d", "-tr", "nnUNetTrainerDVDLC"], ["nnUNetTrainerDVDCL"]),
        (["-d", "10", "-c", "3d_fullres"], ["3d_fullres", "2d"]),
        (["-d", "10", "-c", "2d", "-p", "otherPlans"], ["otherPlans", "-p shortPlans"]),
        (["-d", "77", "-c", "2d"], ["77"]),
    ],
)
def test_the_doctor_explains_what_fails_before_our_code_is_reached(chest_xrays, run_here, arguments, words):
    chest_xrays.settings()
    output = run_here(chest_xrays, "nnunet_cfcl", "doctor", "-device", "cpu", *arguments, status=1)
    failures = "\n".join(line for line in output.splitlines() if "FAIL" in line)
    assert failures and all(word in output for word in words), output
