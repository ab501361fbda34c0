"""When a pretraining is the same as an earlier one, and what is refused before anything is touched."""

import json
from pathlib import Path

import pytest
import torch

from nnunet_cfcl import trainers
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.runs.ranks import Ranks

pytestmark = pytest.mark.end_to_end


def identity(trainer) -> str:
    fold = FoldContext.of(trainer)
    return digest(build_task(fold, trainer.method, build_objective(fold, trainer.method), Ranks()).identity)


def snapshot(folder) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.suffix in (".json", ".pth", ".jsonl")}


SAME = {
    "nnUNetTrainerDVDCL": [{"finetune": {"epochs": 7}}, {"pretrain": {"patches_per_pass": 1}},
                           {"baseline": {"mask_block": 4}}, {"silver": {"min_quality": 0.1}},
                           {"pretrain": {"radius": 0.3}}],
    "nnUNetTrainerVADeR": [{"acquisition": {"probability": 0.1}}, {"counterfactual": {"source": "acquisition"}}],
    "nnUNetTrainerSilverSeg": [{"pretrain": {"temperature": 0.2, "patches_per_pass": 1}}],
    "nnUNetTrainerMAE": [{"pretrain": {"points_per_image": 7}}],
}
OTHER = {
    "nnUNetTrainerDVDCL": [{"pretrain": {"temperature": 0.2}}, {"acquisition": {"probability": 0.1}},
                           {"views": {"rotation_deg": 3.0}}],
    "nnUNetTrainerMVDCL": [{"pretrain": {"radius": 0.3}}],
    "nnUNetTrainerSMVDCL": [{"silver": {"min_quality": 0.1}}],
    "nnUNetTrainerMAE": [{"baseline": {"mask_block": 4}}],
}


@pytest.mark.parametrize(("name", "changes", "same"), [
    *[(name, changes, True) for name, changes in SAME.items()],
    *[(name, changes, False) for name, changes in OTHER.items()],
])
def test_a_pretraining_is_the_same_when_nothing_that_it_uses_changed(make_trainer, name, changes, same):
    before = identity(make_trainer(getattr(trainers, name)))
    for change in changes:
        change = {key: {**({"epochs": 1} if key == "pretrain" else {}), **values} for key, values in change.items()}
        assert (identity(make_trainer(getattr(trainers, name), **change)) == before) is same, change


def test_what_the_labels_mean_decides_for_the_methods_that_use_them(make_trainer):
    for name, uses in (("nnUNetTrainerSDVDCL", True), ("nnUNetTrainerSilverSeg", True), ("nnUNetTrainerDVDCL", False)):
        trainer = make_trainer(getattr(trainers, name))
        before = identity(trainer)
        labels = trainer.dataset_json["labels"]
        trainer.dataset_json = {**trainer.dataset_json, "labels": dict(zip(labels, reversed(labels.values())))}
        assert (identity(trainer) != before) is uses, name


def test_a_finished_pretraining_of_other_settings_is_not_continued_and_nothing_is_touched(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.run_training()
    for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"):
        (Path(trainer.output_folder) / name).unlink(missing_ok=True)
    before = snapshot(tmp_path)
    other = make_trainer(continues=True, pretrain={"epochs": 1, "temperature": 0.2})
    with pytest.raises(UserError, match=r"pretrain.temperature: 0.1 then, 0.2 now.*--c"):
        other.run_training()
    assert snapshot(tmp_path) == before


def test_a_changed_method_setting_starts_anew_and_keeps_the_earlier_weights(make_trainer):
    make_trainer().run_training()
    other = make_trainer(pretrain={"epochs": 1, "temperature": 0.2})
    earlier = (other.pretraining_folder / "checkpoint_final.pth").read_bytes()
    other.run_training()
    assert (other.pretraining_folder / "previous_checkpoint_final.pth").read_bytes() == earlier
    described = json.loads((other.pretraining_folder.parent / "config.json").read_text())
    assert described["method"] == "DVD-CL" and described["pretraining"]["settings"]["pretrain"]["temperature"] == 0.2
    later = (other.pretraining_folder / "checkpoint_final.pth").read_bytes()
    make_trainer(pretrain={"epochs": 1, "temperature": 0.3}).run_training()
    for name, weights in (("previous_", earlier), ("previous_2_", later)):
        assert (other.pretraining_folder / f"{name}checkpoint_final.pth").read_bytes() == weights


def body(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items() if ".seg_layers." not in name}


@pytest.mark.parametrize(("name", "settings", "frozen"), [
    ("nnUNetTrainerDVDCL", {}, 2), ("nnUNetTrainerDVDCL", {"pretrain": {"enabled": False}}, 0),
    ("nnUNetTrainerSilverSeg", {}, 0), ("nnUNetTrainerCFCLScratch", {}, 0)])
def test_pretrained_weights_stay_while_the_segmentation_layers_alone_learn(make_trainer, monkeypatch, name, settings,
                                                                           frozen):
    trainer = make_trainer(getattr(trainers, name), finetune={"epochs": 4, "frozen_fraction": 0.5}, **settings)
    states, begin = [], trainer.on_train_epoch_start
    monkeypatch.setattr(trainer, "on_train_epoch_start", lambda: (states.append(body(trainer)), begin()))
    trainer.run_training()
    same = [all(torch.equal(value, states[epoch + 1][key]) for key, value in states[epoch].items())
            for epoch in range(3)]
    assert same == [epoch < frozen for epoch in range(3)]
