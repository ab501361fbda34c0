"""`nnunet_cfcl pool` and `silver` on real images: once more, killed, refused; and one phase 1 for all folds."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunet_cfcl.data.pool.manifest import manifest_file, pool_folder, read_manifest
from nnunet_cfcl.errors import UserError

pytestmark = pytest.mark.end_to_end

DATASET, PLANS = "Dataset012_ChestXraysPool", "shortPlans"
POOL = ["nnunet_cfcl", "pool", "-d", "12", "-c", "2d", "-p", PLANS, "-np", "1"]


SILVER = ["nnunet_cfcl", "silver", "-d", "12", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerCFCLScratch", "-p", PLANS,
          "-device", "cpu", "-np", "1"]


def _train(fold: int) -> list[str]:
    return ["nnUNetv2_train", "12", "2d", str(fold), "-tr", "nnUNetTrainerMVDCL", "-p", PLANS, "-device", "cpu"]


@pytest.fixture
def x_rays(chest_xrays_with_pool, tmp_path):
    """A copy that a test may spoil."""
    return chest_xrays_with_pool.copy(tmp_path / "copy")


def _preprocessed_pool(nnunet) -> Path:
    return pool_folder(nnunet.folder("preprocessed") / DATASET / "nnUNetPlans_2d")


def _written(nnunet) -> dict[str, int]:
    folder = _preprocessed_pool(nnunet)
    return {file.name: file.stat().st_mtime_ns for file in (*folder.iterdir(), manifest_file(folder))}


def test_once_more_there_is_nothing_to_do(x_rays, run_here):
    before = _written(x_rays)
    output = run_here(x_rays, *POOL)
    assert "16 cases of the pool (0 new, 16 with silver labels" in output
    assert "no quality given, 16 with a confidence per voxel" in output
    assert "next: nnUNetv2_train 12 2d 0 -p shortPlans -tr nnUNetTrainerSDVDCL" in output
    # the manifest is written in every case
    after = _written(x_rays)
    assert {name for name in before if after[name] != before[name]} <= {manifest_file(_preprocessed_pool(x_rays)).name}
    assert before.keys() == after.keys()


def test_a_killed_run_is_noticed_by_the_training_and_gone_on_with(x_rays, chest_xrays_with_pool, trainers_of):
    folder = _preprocessed_pool(x_rays)
    shutil.rmtree(folder)
    manifest_file(folder).unlink()
    process = x_rays.start(*POOL)
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(folder.glob("*.b2nd")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, 9)
    process.wait()
    with pytest.raises(UserError, match="is incomplete.*nnunet_cfcl pool -d 12 -c 2d -p shortPlans"):
        trainers_of(x_rays, DATASET, "2d")().run_training()
    x_rays.run(*POOL)
    manifest = read_manifest(folder)
    assert manifest.complete and len(manifest.cases) == 16
    assert manifest.content() == read_manifest(_preprocessed_pool(chest_xrays_with_pool)).content()


def _unknown_values(raw: Path) -> list[str]:
    labels = sorted((raw / "labelsSilver").glob("*.png"))[:2]
    for label in labels:
        mask = np.array(Image.open(label))
        mask[:3] = 7
        Image.fromarray(mask).save(label)
    return [f"{label.name}: has the values 7, which are not in dataset.json" for label in labels]


def _other_geometry(raw: Path) -> list[str]:
    labels = sorted((raw / "labelsSilver").glob("*.png"))[:2]
    for label in labels:
        Image.open(label).crop((0, 0, 50, 64)).save(label)
        label.with_suffix(".npz").unlink()
    return [f"{label.name}: has shape (1, 64, 50), expected (1, 64, 64) as its image" for label in labels]


def _no_number(raw: Path) -> list[str]:
    cases = [label.stem for label in sorted((raw / "labelsSilver").glob("*.png"))[:3]]
    rows = "".join(f"{case},{quality}\n" for case, quality in zip(cases, ("good", "0.9", "1.1")))
    (raw / "labelsSilver" / "silver.csv").write_text(f"case,quality\n{rows}")
    return [f"the quality of case {case} must be a number from 0 to 1, found '{text}'"
            for case, text in ((cases[0], "good"), (cases[2], "1.1"))]


def _in_both(raw: Path) -> list[str]:
    images = sorted((raw / "imagesTr").iterdir())[:2]
    for image in images:
        shutil.copy(image, raw / "imagesUn")
    return [f"case {image.name.removesuffix('_0000.png')} is also in imagesTr" for image in images]


def _missing(raw: Path) -> list[str]:
    for folder in ("imagesUn", "labelsSilver"):
        shutil.rmtree(raw / folder)
    return [f"there are no images in {raw / 'imagesUn'}", "put images named CASE_0000.png into imagesUn"]


SPOILED = [_unknown_values, _other_geometry, _no_number, _in_both]


def _errors(output: str) -> int:
    assert "Traceback" not in output, output
    return output.count("nnunet_cfcl pool: ")


@pytest.fixture
def refusal(run_here) -> Callable[..., str]:
    """The output of a command, run in this process, that ends with one error."""

    def run(nnunet, command: list[str]) -> str:
        output = run_here(nnunet, *command, status=1)
        assert _errors(output) == 1, output
        return output

    return run


@pytest.mark.parametrize("spoil", [*SPOILED, _missing])
def test_bad_input_is_refused_in_one_error_that_names_all_offenders(x_rays, refusal, spoil):
    before = _written(x_rays)
    offenders = spoil(x_rays.folder("raw") / DATASET)
    output = refusal(x_rays, POOL)
    assert all(offender in output for offender in offenders), output
    assert spoil is _missing or f"{len(offenders)} problems in" in output
    assert _written(x_rays) == before


def test_different_faults_are_all_in_the_one_error_of_the_command(x_rays):
    before = _written(x_rays)
    raw = x_rays.folder("raw") / DATASET
    offenders = [line for spoil in (_unknown_values, _no_number, _in_both) for line in spoil(raw)]
    output = x_rays.run(*POOL, status=1)
    assert _errors(output) == 1 and all(offender in output for offender in offenders), output
    assert f"{len(offenders)} problems in" in output
    assert _written(x_rays) == before


def test_pool_images_with_a_missing_channel_are_all_named(hippocampus, refusal, tmp_path):
    nnunet = hippocampus.copy(tmp_path / "copy")
    dataset = "Dataset004_Hippocampus"
    raw, preprocessed = (nnunet.folder(name) / dataset for name in ("raw", "preprocessed"))
    description = json.loads((raw / "dataset.json").read_text())
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "T1", "1": "T2"}}))
    images = sorted((raw / "imagesTr").iterdir())[:3]
    (raw / "imagesUn").mkdir()
    for number, image in enumerate(images):
        for channel in range(2 if number == 1 else 1):
            shutil.copy(image, raw / "imagesUn" / f"new_{number}_{channel:04d}.nii.gz")
    output = refusal(nnunet, ["nnunet_cfcl", "pool", "-d", "4", "-c", "2d", "-p", PLANS, "-np", "1"])
    for number in (0, 2):
        assert f"new_{number}_0000.nii.gz: has 1 channels, expected 2 (T1, T2); new_{number}_0001.nii.gz miss" in output
    assert "2 problems in" in output and "new_1" not in output


def test_a_pool_that_was_emptied_stops_the_training_until_the_command_has_removed_it(x_rays, trainers_of, run_here):
    for folder in ("imagesUn", "labelsSilver"):
        shutil.rmtree(x_rays.folder("raw") / DATASET / folder)
        (x_rays.folder("raw") / DATASET / folder).mkdir()
    with pytest.raises(UserError, match="imagesUn changed .*16 removed.*"
                                        "run nnunet_cfcl pool -d 12 -c 2d -p shortPlans"):
        trainers_of(x_rays, DATASET, "2d")(pretrain={"data": "pool"}).run_training()
    assert "16 cases are gone from the raw dataset and removed" in run_here(x_rays, *POOL)
    assert not _preprocessed_pool(x_rays).exists() and not manifest_file(_preprocessed_pool(x_rays)).exists()
    assert "there are no images in" in run_here(x_rays, *POOL, status=1)
    with pytest.raises(UserError, match="pretrain.data is 'pool', but the dataset has no pool.*imagesUn.*"
                                        "nnunet_cfcl pool -d 12"):
        trainers_of(x_rays, DATASET, "2d")(pretrain={"data": "pool"}).run_training()


def test_silver_makes_the_labels_of_nnunets_own_prediction_keeps_them_and_warns_another_fold(
        chest_xrays_with_pool, tmp_path, run_here):
    nnunet = chest_xrays_with_pool.copy(tmp_path / "copy", results=True)
    labels = nnunet.folder("raw") / DATASET / "labelsSilver"
    # the fixture's labels are of nnUNetv2_predict
    refused = run_here(nnunet, *SILVER, status=1)
    assert "that nnunet_cfcl silver did not make" in refused and f"mv {labels} {labels}_mine" in refused
    by_hand = labels.rename(labels.with_name("labelsSilver_mine"))
    nnunet.variables["nnUNet_cfcl_chromap"] = "1"
    output = nnunet.run(*SILVER)
    assert "nnUNetTrainerCFCLScratch__shortPlans__2d/fold_0: 16 cases of imagesUn are labelled" in output
    assert "next: nnUNetv2_train 12 2d 0 -p shortPlans -tr nnUNetTrainerSDVDCL" in output
    masks = sorted(by_hand.glob("*.png"))
    assert len(masks) == 16 == len(list(labels.glob("*.png"))) and not (labels / "chromap").exists()
    for mask in masks:
        np.testing.assert_array_equal(np.array(Image.open(labels / mask.name)), np.array(Image.open(mask)))
    manifest = read_manifest(_preprocessed_pool(nnunet))
    assert len(manifest.model_cases) == len(manifest.with_silver()) == 16
    assert all(record.quality_given and record.probabilities for record in manifest.cases.values())
    assert set(manifest.model.training) == set(nnunet.split(DATASET)["train"])
    before = {file.name: file.stat().st_mtime_ns for file in labels.iterdir()}
    assert "have labels of nnUNetTrainerCFCLScratch__shortPlans__2d/fold_0 already" in run_here(nnunet, *SILVER)
    assert {file.name: file.stat().st_mtime_ns for file in labels.iterdir()} == before
    doctor = run_here(nnunet, "nnunet_cfcl", "doctor", "-d", "12", "-c", "2d", "-p", PLANS, "-tr",
                      "nnUNetTrainerSilverSeg", "-device", "cpu")
    assert "validation figures of fold 1, 2, 3, 4 are not independent" in doctor
    nnunet.run_until("validation figures of fold 1 are not independent; fix: label again with nnunet_cfcl silver -d 12 "
                     "-c 2d -f 1 -tr nnUNetTrainerCFCLScratch -p shortPlans", "nnUNetv2_train", "12", "2d", "1", "-tr",
                     "nnUNetTrainerSilverSeg", "-p", PLANS, "-device", "cpu")


def _shared_folder(nnunet) -> Path:
    (folder,) = nnunet.fold(DATASET, "2d", "nnUNetTrainerMVDCL").parent.glob("cfcl_pool_*")
    return folder


def test_one_pretraining_on_the_pool_serves_another_fold(x_rays):
    x_rays.settings(pretrain={"data": "pool"})
    first = x_rays.run_until("Phase 2", *_train(0))
    # of the 16, one is of a labelled patient
    assert "phase 1 has 15 cases of the pool (1 left out: same patient as a labelled case)" in first
    folder = _shared_folder(x_rays)
    before = (folder / "checkpoint_final.pth").read_bytes()
    second = x_rays.run_until("Training done", *_train(1))
    assert f"{folder / 'checkpoint_final.pth'} is reused" in second and "Pretraining epoch" not in second
    assert "Epoch 1" in second
    assert (_shared_folder(x_rays) / "checkpoint_final.pth").read_bytes() == before
    config = json.loads((x_rays.fold(DATASET, "2d", "nnUNetTrainerMVDCL", number=1) / "cfcl/config.json").read_text())
    assert config["pretraining_folder"] == str(folder) and len(config["pretraining"]["cases"]) == 15


@pytest.mark.nightly
def test_of_two_folds_started_together_the_second_waits_for_the_pretraining_of_the_first(x_rays):
    x_rays.settings(pretrain={"data": "pool", "epochs": 4, "iterations_per_epoch": 10})
    x_rays.run_until("Phase 2", *_train(2))  # the splits and everything else that both would make
    shutil.rmtree(x_rays.folder("results") / DATASET)
    processes = [x_rays.start(*_train(fold)) for fold in (0, 1)]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    reusing, pretraining = sorted(outputs, key=lambda output: output.count("Pretraining epoch"))
    assert pretraining.count("Pretraining epoch") == 4 and "is reused" not in pretraining
    assert "waiting for it to finish" in reusing and "is reused" in reusing
    assert "Pretraining epoch" not in reusing and all("Mean Validation Dice" in output for output in outputs)
