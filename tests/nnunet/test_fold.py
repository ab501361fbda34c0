"""A fold found by names is that of the live trainer: the same cases, folders, weights, identity."""

import json

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl import trainers
from nnunet_cfcl.config import SettingsError
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.pretraining_phase import PretrainingPhase
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.runs.ranks import Ranks
from tests.toy_dataset import DATASET

CPU = torch.device("cpu")
PRETRAINING = [name for name in trainers.__all__ if hasattr(getattr(trainers, name), "method")
               and issubclass(getattr(trainers, name), nnUNetTrainer)]
SHORT = {"pretrain": {"epochs": 2, "iterations_per_epoch": 1, "images_per_step": 2, "points_per_image": 10},
         "counterfactual": {"count": 1}, "finetune": {"iterations_per_epoch": 7}}


@pytest.fixture(autouse=True)
def settings(settings_file):
    """Short ones, in a file; a function that changes a section."""
    return settings_file(SHORT)


def found(name="nnUNetTrainerDVDCL", fold="0", configuration="2d"):
    return FoldContext.find(getattr(trainers, name, nnUNetTrainer), "7", configuration, fold, "nnUNetPlans", CPU,
                            lambda *line, **ignored: None)


def live(toy, name="nnUNetTrainerDVDCL", fold=0, configuration="2d"):
    folder = toy / "nnUNet_preprocessed" / DATASET
    plans = {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}
    return getattr(trainers, name)(plans, configuration, fold, json.loads((folder / "dataset.json").read_text()), CPU)


def task_of(fold):
    method = fold.trainer_class.method
    return build_task(fold, method, build_objective(fold, method), Ranks())


@pytest.mark.parametrize("name", PRETRAINING)
def test_the_identity_of_a_pretraining_is_that_of_the_live_trainer(toy, name):
    one, other = task_of(found(name)), task_of(FoldContext.of(live(toy, name)))
    assert json.dumps(one.identity) == json.dumps(other.identity)
    for field in ("folder", "geometry", "patches_per_pass", "device", "workers", "checkpoints", "settings"):
        assert getattr(one, field) == getattr(other, field), field


@pytest.mark.parametrize("fold, configuration", [("all", "2d"), ("3", "2d_small")])
def test_folders_and_cases_are_those_of_the_live_trainer(toy, fold, configuration):
    one = found(fold=fold, configuration=configuration)
    other = FoldContext.of(live(toy, fold=fold if fold == "all" else int(fold), configuration=configuration))
    for name in ("trainer_class", "configuration_name", "fold", "dataset", "dataset_json", "preprocessed", "folder",
                 "device", "settings", "saves", "deep_supervision", "iterations_per_epoch", "geometry", "schemes"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.compiles() == other.compiles() and one.split() == other.split()
    assert one.labels.ignore_label == other.labels.ignore_label


def test_a_plan_that_was_moved_from_another_dataset_counts_as_the_live_trainer_counts_it(toy, change_plan):
    change_plan(lambda plan: plan.update(dataset_name="Dataset008_Other"))
    one, other = found(), live(toy)
    assert str(one.folder) == other.output_folder
    assert str(one.preprocessed) == other.preprocessed_dataset_folder


def test_the_network_begins_with_the_weights_of_the_live_trainer(toy):
    trainer = live(toy)
    trainer.initialize()
    weights, expected = found().build_network().state_dict(), trainer.network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


@pytest.mark.parametrize("name", ["nnUNetTrainerSilverSeg", "nnUNetTrainer"])
def test_the_loss_is_that_of_the_trainer(toy, name):
    torch.manual_seed(0)
    logits = [torch.randn(2, 2, 16 // n, 16 // n) for n in (1, 2)]
    labels = torch.randint(0, 2, (2, 1, 16, 16))
    expected = FoldContext.of(live(toy, "nnUNetTrainerSilverSeg")).loss()
    assert torch.equal(found(name).loss()(logits, labels), expected(logits, labels))


def test_nothing_is_written(toy):
    found().build_network()
    assert not list((toy / "nnUNet_results" / DATASET).iterdir())


def test_a_fold_of_nnunets_own_trainer_has_settings_too(settings):
    settings(pretrain={"epochs": 5})
    assert found("stock").settings.pretrain.epochs == 5
    assert found("stock").folder.parent.name == "nnUNetTrainer__nnUNetPlans__2d"
    settings(pretrain={"epoch": 5})
    with pytest.raises(SettingsError, match="'pretrain.epochs'"):
        found("stock")


def test_the_trainers_class_builds_the_network_and_divides_the_cases():
    class Mine(trainers.nnUNetTrainerDVDCL):
        @staticmethod
        def build_network_architecture(*arguments):
            return torch.nn.Conv2d(1, 2, 1)

        def do_split(self):
            training, validation = super().do_split()
            assert self.settings.pretrain.epochs == 2 and self.output_folder.endswith("fold_0")
            return training[:1], validation[:1]

    fold = FoldContext.find(Mine, "7", "2d", "0", "nnUNetPlans", CPU, print)
    assert isinstance(fold.build_network(), torch.nn.Conv2d)
    assert [len(cases) for cases in fold.split()] == [1, 1]
    assert fold.folder.parent.name == "Mine__nnUNetPlans__2d"
    with pytest.raises(UserError, match="no decoder of nnU-Net's U-Net kind"):
        PretrainingPhase(fold, Mine.method, None, Ranks()).run(fold.build_network())


def test_the_networks_builder_may_be_a_method_of_the_object():
    class Mine(trainers.nnUNetTrainerDVDCL):
        def build_network_architecture(self, *arguments):
            return torch.nn.Conv2d(1, 2 if self.settings.pretrain.enabled else 3, 1)

    fold = FoldContext.find(Mine, "7", "2d", "0", "nnUNetPlans", CPU, print)
    assert fold.build_network().out_channels == 2
