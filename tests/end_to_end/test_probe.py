"""`nnunet_cfcl probe` on a briefly trained model of real X-rays."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.end_to_end

TRAINER, DATASET = "nnUNetTrainerCFCLScratch", "Dataset012_ChestXraysPool"


def test_a_trained_fold_tells_more_than_an_untrained_network(chest_xrays_with_pool, run_here, tmp_path):
    nnunet = chest_xrays_with_pool
    command = ("nnunet_cfcl", "probe", "-d", "12", "-c", "2d", "-p", "shortPlans", "-f", "0", "-device", "cpu")
    nnunet.run(*command, "-tr", TRAINER, "--untrained", "-o", str(tmp_path / "probe"))
    content = json.loads((tmp_path / "probe" / "probe.json").read_text())
    trained, untrained = content["models"]
    assert trained["model"] == TRAINER and untrained["model"] == "untrained"
    assert trained["image_set"] == untrained["image_set"]
    split = nnunet.split(DATASET)
    assert set(trained["cases"]["validation"]) <= set(split["val"])
    assert set(trained["cases"]["training"]) <= set(split["train"])
    figures = [{name: one["mean"] for name, one in model["figures"].items()} for model in (trained, untrained)]
    assert figures[0]["probe_dice"] > figures[1]["probe_dice"] + 0.1
    assert figures[0]["class_distance"] > figures[1]["class_distance"]
    assert figures[0]["counterfactual_distance"] < 1
    assert len(trained["per_case"]) == len(split["val"]) and {"1", "2"} == trained["probe_dice"].keys()
    assert "linear probe Dice" in (tmp_path / "probe" / "probe.md").read_text()
    assert np.asarray(Image.open(tmp_path / "probe" / "probe.png").convert("L")).std() > 5
    # the plan's own network has four times the features of the trained one
    weights = nnunet.fold(DATASET, "2d", TRAINER) / "checkpoint_final.pth"
    output = run_here(nnunet, *command[:6], *command[8:], "--weights", str(weights), "-o", str(tmp_path), status=1)
    assert "does not fit the network of the plan" in output and output.count("nnunet_cfcl probe: ") == 1, output
