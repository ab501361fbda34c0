"""2d on real volumes and on real chest X-rays, by nnU-Net's own commands."""

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.end_to_end

TRAINER, PLANS = "nnUNetTrainerDVDCL", "shortPlans"


def test_2d_trains_on_slices_of_real_volumes(hippocampus):
    hippocampus.settings()
    output = hippocampus.run("nnUNetv2_train", "4", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    assert "Pretraining epoch 1" in output and "Mean Validation Dice" in output
    assert (hippocampus.fold("Dataset004_Hippocampus", "2d") / "validation/summary.json").exists()


def test_2d_trains_on_real_chest_x_rays_and_predicts_those_of_another_scanner(chest_xrays):
    chest_xrays.settings()
    output = chest_xrays.run("nnUNetv2_train", "10", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    assert "Pretraining epoch 1" in output and "Mean Validation Dice" in output
    images, predicted = chest_xrays.folder("raw") / "Dataset010_ChestXrays" / "imagesTs", chest_xrays.root / "predicted"
    chest_xrays.run(
        "nnUNetv2_predict", "-i", str(images), "-o", str(predicted), "-d", "10", "-c", "2d", "-f", "0", "-tr", TRAINER,
        "-p", PLANS, "-device", "cpu",
    )
    masks = [np.asarray(Image.open(file)) for file in sorted(predicted.glob("*.png"))]
    assert len(masks) == 4 and all(mask.shape == (256, 256) and mask.max() <= 2 for mask in masks)


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
def test_the_doctor_explains_what_fails_before_our_code_is_reached(chest_xrays, arguments, words):
    chest_xrays.settings()
    output = chest_xrays.run("nnunet_cfcl", "doctor", "-device", "cpu", *arguments, status=1)
    failures = "\n".join(line for line in output.splitlines() if "FAIL" in line)
    assert failures and all(word in output for word in words), output
