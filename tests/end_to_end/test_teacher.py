"""Phase 3 by the stock commands in 2D and 3D: killed, resumed, predicted with CHRO-maps; without a pool; begun late."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.trainers import nnUNetTrainerCFCLScratch, nnUNetTrainerCFCLTeacher, nnUNetTrainerDVDCL

pytestmark = pytest.mark.end_to_end

PLANS = "shortPlans"
X_RAYS, VOLUMES = "Dataset012_ChestXraysPool", "Dataset004_Hippocampus"
TEACHER = {"epochs": 3}


def _train(dataset: str, configuration: str, trainer: str, *more: str) -> list[str]:
    return ["nnUNetv2_train", dataset[7:10].lstrip("0"), configuration, "0", "-tr", trainer, "-p", PLANS, "-device",
            "cpu", *more]


def _weights(file: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=False)["network_weights"]
    return found


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _epochs(fold: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (fold / "cfcl/teacher/log.jsonl").read_text().splitlines()]


def _log(fold: Path) -> str:
    return "".join(file.read_text() for file in sorted(fold.glob("training_log_*.txt")))


@pytest.fixture(scope="module")
def x_rays(chest_xrays_with_pool, tmp_path_factory):
    """A fold of the X-rays killed in phase 3 and resumed; with what the two commands printed."""
    nnunet = chest_xrays_with_pool.copy(tmp_path_factory.mktemp("teacher"))
    nnunet.load_in_main_process()
    nnunet.settings(teacher=TEACHER)
    train = _train(X_RAYS, "2d", "nnUNetTrainerDVDCLTeacher")
    first = nnunet.run_until("Phase 3 epoch 1", *train)
    second = nnunet.run(*train, "--c")
    return nnunet, nnunet.fold(X_RAYS, "2d", "nnUNetTrainerDVDCLTeacher"), (first, second)


def test_a_run_killed_in_phase_3_goes_on_there(x_rays):
    _, fold, (first, second) = x_rays
    assert "Phase 1: DVD-CL pretraining" in first and "Epoch 1" in first
    assert "a moving-average teacher labels the pool (7 eureka_cr, 8 philips_dr) as it is" in first
    assert "Phase 3 resumes after epoch" in second and "Phase 3 epoch 2" in second and "Phase 3 done" in second
    assert not any(text in second for text in ("Phase 1", "Pretraining", "Epoch 0", "Epoch 1", "Phase 3 epoch 0"))
    assert _epochs(fold) == [0, 1, 2] and "Mean Validation Dice" in second


def test_phase_2_s_weights_are_kept_beside_those_of_phase_3(x_rays):
    _, fold, _ = x_rays
    final, before = (_weights(fold / f"checkpoint_{name}.pth") for name in ("final", "phase_2"))
    assert final.keys() == before.keys() and not _same(final, before)
    assert _same(final, _weights(fold / "cfcl/teacher/checkpoint_final.pth"))
    assert not (fold / "checkpoint_latest.pth").exists()
    assert {file.name for file in (fold / "cfcl/teacher").iterdir()} == {
        "checkpoint_final.pth", "log.jsonl", "progress.png", "pseudo_labels.png"}


def test_the_resumed_run_ends_with_the_weights_of_an_undisturbed_one(x_rays):
    nnunet, fold, _ = x_rays
    expected = _weights(fold / "checkpoint_final.pth")
    kept = fold.with_name("kept")
    shutil.copytree(fold, kept)
    try:
        (fold / "checkpoint_final.pth").unlink()
        shutil.rmtree(fold / "cfcl/teacher")
        shutil.copy(fold / "checkpoint_phase_2.pth", fold / "checkpoint_latest.pth")
        output = nnunet.run_until("Training done", *_train(X_RAYS, "2d", "nnUNetTrainerDVDCLTeacher", "--c"))
        assert "Phase 3 epoch 0" in output
        assert _same(_weights(fold / "checkpoint_final.pth"), expected)
    finally:
        shutil.rmtree(fold)
        kept.rename(fold)


def test_a_finished_run_that_is_continued_changes_nothing(x_rays):
    nnunet, fold, _ = x_rays
    before = [(fold / name).read_bytes() for name in ("checkpoint_phase_2.pth", "cfcl/teacher/checkpoint_final.pth")]
    expected = _weights(fold / "checkpoint_final.pth")
    output = nnunet.run_until("Training done", *_train(X_RAYS, "2d", "nnUNetTrainerDVDCLTeacher", "--c"))
    assert "Phase 3 was finished before with the same settings" in output and "Phase 3 epoch" not in output
    assert _same(_weights(fold / "checkpoint_final.pth"), expected)
    assert before == [(fold / name).read_bytes()
                      for name in ("checkpoint_phase_2.pth", "cfcl/teacher/checkpoint_final.pth")]


def test_it_is_predicted_with_chromaps_and_exported_as_a_stock_model(x_rays, tmp_path):
    nnunet, fold, _ = x_rays
    images = tmp_path / "images"
    images.mkdir()
    for image in sorted((nnunet.folder("raw") / X_RAYS / "imagesUn").iterdir())[:2]:
        os.link(image, images / image.name)
    nnunet.run("nnunet_cfcl", "predict", "--chromap", "-i", str(images), "-o", str(tmp_path / "masks"), "-d", "12",
               "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerDVDCLTeacher", "-p", PLANS, "-device", "cpu", "-npp", "0",
               "-nps", "0")
    assert len(list((tmp_path / "masks").glob("*.png"))) == len(list((tmp_path / "masks/chromap").glob("*.png"))) == 2
    nnunet.run("nnunet_cfcl", "export-stock", str(fold), str(tmp_path / "stock"))
    exported = _weights(tmp_path / "stock/fold_0/checkpoint_final.pth")
    assert _same(exported, _weights(fold / "checkpoint_final.pth"))


@pytest.fixture(scope="module")
def volumes(hippocampus, real_images, tmp_path_factory):
    """The hippocampi, and four more volumes as a preprocessed pool."""
    nnunet = hippocampus.copy(tmp_path_factory.mktemp("teacher_3d"))
    pool = nnunet.folder("raw") / VOLUMES / "imagesUn"
    pool.mkdir()
    for image in sorted((real_images / VOLUMES / "imagesTr").glob("*.nii.gz"))[10:14]:
        shutil.copy(image, pool)
    nnunet.run("nnunet_cfcl", "pool", "-d", "4", "-c", "3d_fullres", "-p", PLANS, "-np", "1")
    nnunet.settings(finetune={"epochs": 1}, teacher={"epochs": 2})
    return nnunet


def test_volumes_are_trained_killed_resumed_and_predicted_with_chromaps(volumes, tmp_path):
    train = _train(VOLUMES, "3d_fullres", "nnUNetTrainerCFCLTeacher")
    first = volumes.run_until("Phase 3 epoch 0", *train)
    assert "labels the pool (4 pool) as it is" in first and "Phase 1" not in first
    output = volumes.run(*train, "--c")
    assert "Phase 3 resumes after epoch 0" in output and "Phase 3 done" in output
    fold = volumes.fold(VOLUMES, "3d_fullres", "nnUNetTrainerCFCLTeacher")
    assert _epochs(fold) == [0, 1]
    lines = [json.loads(line) for line in (fold / "cfcl/teacher/log.jsonl").read_text().splitlines()]
    assert all(np.isfinite([value for key, value in line.items()]).all() for line in lines)
    (tmp_path / "images").mkdir()
    image = next(iter(sorted((volumes.folder("raw") / VOLUMES / "imagesUn").iterdir())))
    os.link(image, tmp_path / "images" / image.name)
    volumes.run("nnunet_cfcl", "predict", "--chromap", "-i", str(tmp_path / "images"), "-o", str(tmp_path / "masks"),
                "-d", "4", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerCFCLTeacher", "-p", PLANS, "-device",
                "cpu", "-npp", "0", "-nps", "0")
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 1
    assert list((tmp_path / "masks/chromap").glob("*.png"))


def test_without_a_pool_phase_3_is_skipped_with_a_word(make_trainer, hippocampus):
    trainer = make_trainer(nnUNetTrainerCFCLTeacher)
    trainer.run_training()
    fold = Path(trainer.output_folder)
    assert "Phase 3 is skipped: it learns from a pool of unlabelled images, and the fold has none" in _log(fold)
    assert not (fold / "cfcl/teacher").exists() and not (fold / "checkpoint_phase_2.pth").exists()


def test_phase_3_demanded_without_a_pool_is_an_error_before_any_training(make_trainer):
    trainer = make_trainer(nnUNetTrainerDVDCL, teacher={"enabled": True})
    with pytest.raises(UserError, match="teacher.enabled is true.*the fold has none .*imagesUn.*nnunet_cfcl pool"):
        trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("**/*.pth"))


@pytest.fixture
def make_x_ray_trainer(trainers_of, chest_xrays_with_pool):
    return trainers_of(chest_xrays_with_pool, X_RAYS, "2d")


def test_any_trainer_of_the_plugin_runs_phase_3_where_the_setting_demands_it(make_x_ray_trainer):
    trainer = make_x_ray_trainer(nnUNetTrainerCFCLScratch, teacher={"enabled": True, "epochs": 1})
    trainer.run_training()
    assert "Phase 3 done" in _log(Path(trainer.output_folder))


def test_a_teacher_switched_off_is_the_trainer_without_it(make_x_ray_trainer):
    trainer = make_x_ray_trainer(nnUNetTrainerCFCLTeacher, teacher={"enabled": False})
    trainer.run_training()
    assert "Phase 3" not in _log(Path(trainer.output_folder))


def test_phase_3_begins_with_the_weights_of_a_finished_training(make_x_ray_trainer, tmp_path):
    finished = make_x_ray_trainer(nnUNetTrainerCFCLScratch)
    finished.run_training()
    file = Path(finished.output_folder) / "checkpoint_final.pth"
    trainer = make_x_ray_trainer(nnUNetTrainerCFCLTeacher, teacher={"epochs": 1, "start_from": str(file)})
    trainer.run_training()
    fold = Path(trainer.output_folder)
    assert "Phases 0 to 2 are left out" in _log(fold) and "Phase 3 epoch 0" in _log(fold)
    assert _same(_weights(fold / "checkpoint_phase_2.pth"), _weights(file))
    assert not _same(_weights(fold / "checkpoint_final.pth"), _weights(file))


@pytest.mark.parametrize("content", [None, b"", {"network_weights": {"other": torch.zeros(1)}}])
def test_weights_to_start_from_that_do_not_fit_are_refused_before_anything_is_written(
    make_x_ray_trainer, tmp_path, content
):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    trainer = make_x_ray_trainer(nnUNetTrainerCFCLTeacher, teacher={"start_from": str(file)})
    with pytest.raises(UserError, match="weights.pth.*correct teacher.start_from, or leave it out"):
        trainer.run_training()
    assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_changed_settings_begin_phase_3_anew_and_keep_the_earlier_one(make_x_ray_trainer):
    make_x_ray_trainer(nnUNetTrainerCFCLTeacher, teacher={"epochs": 1}).run_training()
    trainer = make_x_ray_trainer(nnUNetTrainerCFCLTeacher, continues=True, teacher={"epochs": 1, "confidence": 0.8})
    fold = Path(trainer.output_folder)
    maybe_load_checkpoint(trainer, True, False, None)
    trainer.run_training()
    assert (fold / "cfcl/teacher/previous_checkpoint_final.pth").exists()
    log = _log(fold)
    assert log.count("Phase 3 epoch 0") == 2 and log.count("\nEpoch 0") <= 1
