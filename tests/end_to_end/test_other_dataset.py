"""Pretraining on one dataset, fine-tuning on another: the commands of docs/how-to/pretrain-elsewhere.md."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.end_to_end

SOURCE, TARGET = "Dataset010_ChestXrays", "Dataset011_OtherScanner"
PLANS, MOVED = "shortPlans", "shortPlansFrom10"
TRAINER = "nnUNetTrainerDVDCL"


def _train(trainer: str, *more: str) -> list[str]:
    return ["nnUNetv2_train", "11", "2d", "0", "-tr", trainer, "-p", MOVED, "-device", "cpu", *more]


def _other_scanner(real_images: Path, raw: Path) -> None:
    """Five X-rays of the scanner that the source has none of, with masks of one lung field: other labels."""
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    names = [file.name for file in sorted((real_images / "cxr" / "masks").glob("CHNCXR*.png"))[20:25]]
    for name in names:
        os.link(real_images / "cxr" / "images" / name, raw / "imagesTr" / name.replace(".png", "_0000.png"))
        mask = np.asarray(Image.open(real_images / "cxr" / "masks" / name))
        Image.fromarray((mask > 0).astype(np.uint8)).save(raw / "labelsTr" / name)
    description = {"channel_names": {"0": "xray"}, "labels": {"background": 0, "lung": 1}, "numTraining": len(names)}
    (raw / "dataset.json").write_text(json.dumps({**description, "file_ending": ".png"}))


@pytest.fixture(scope="module")
def pretrained(chest_xrays, real_images, tmp_path_factory):
    """The how-to's commands up to the training of the target; returns the folders and the pretrained weights."""
    nnunet = chest_xrays.copy(tmp_path_factory.mktemp("other") / "copy")
    short = {"epochs": 1, "iterations_per_epoch": 1}
    nnunet.settings(pretrain=short, finetune=short)
    _other_scanner(real_images, nnunet.folder("raw") / TARGET)
    nnunet.run(
        "python", "-m", "nnunet_cfcl.pretrain", "10", "2d", "all", "-tr", TRAINER, "-p", PLANS, "-device", "cpu"
    )
    nnunet.run("nnUNetv2_plan_and_preprocess", "-d", "11", "-npfp", "1", "--no_pp", "--no_pbar")
    nnunet.run("nnUNetv2_move_plans_between_datasets", "-s", "10", "-t", "11", "-sp", PLANS, "-tp", MOVED)
    nnunet.run("nnUNetv2_preprocess", "-d", "11", "-plans_name", MOVED, "-c", "2d", "-np", "1", "--no_pbar")
    nnunet.load_in_main_process()
    fold = nnunet.folder("results") / SOURCE / f"{TRAINER}__{PLANS}__2d" / "fold_all"
    return nnunet, fold / "cfcl/pretraining/checkpoint_final.pth"


def test_all_cases_of_the_source_are_pretrained_on_and_its_plan_is_the_targets(pretrained):
    nnunet, weights = pretrained
    config = json.loads((weights.parents[1] / "config.json").read_text())
    images = nnunet.folder("raw") / SOURCE / "imagesTr"
    assert set(config["pretraining"]["cases"]) == {f.name.removesuffix("_0000.png") for f in images.iterdir()}
    files = [nnunet.folder("preprocessed") / name for name in (f"{SOURCE}/{PLANS}.json", f"{TARGET}/{MOVED}.json")]
    networks = [json.loads(file.read_text())["configurations"]["2d"]["architecture"] for file in files]
    assert networks[0] == networks[1]


def test_phase_2_on_the_target_starts_from_the_weights_of_the_source(pretrained):
    nnunet, weights = pretrained
    output = nnunet.run_until("Epoch 0", *_train(TRAINER, "-pretrained_weights", str(weights)))
    assert "Weights were given" in output and "Phase 1" not in output
    # written before the first epoch, during which the command was killed
    start = nnunet.fold(TARGET, "2d", TRAINER, MOVED) / "checkpoint_latest.pth"
    found, given = (
        torch.load(file, map_location="cpu", weights_only=False)["network_weights"] for file in (start, weights)
    )
    compared = [key for key in found if ".seg_layers." not in key]
    assert "encoder.stages.0.0.convs.0.conv.weight" in compared
    assert all(torch.equal(found[key], given[key]) for key in compared)
    heads = {len(content[key]) for content in (found, given) for key in content if key not in compared}
    assert heads == {2, 3}, "background and lung; background and both lungs"


@pytest.mark.nightly
def test_the_trainer_without_a_pretraining_of_its_own_takes_them_too(pretrained):
    nnunet, weights = pretrained
    output = nnunet.run_until("Training done", *_train("nnUNetTrainerCFCLScratch", "-pretrained_weights", str(weights)))
    assert "Loading pretrained weights from file" in output and "Phase 1" not in output
    content = torch.load(
        nnunet.fold(TARGET, "2d", "nnUNetTrainerCFCLScratch", MOVED) / "checkpoint_final.pth", weights_only=False
    )
    assert np.isfinite(content["logging"]["train_losses"]).all()
