"""Phase 1 without a trainer's constructor: the same cases, folders, weights and identity as with it; clear errors."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl import trainers
from nnunet_cfcl.cli import pretrain
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phases.bare_trainer import bare_trainer
from nnunet_cfcl.phases.pretraining_phase import PretrainingPhase
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.trainers.lookup import find_trainer

DATASET, CPU = "Dataset007_Toy", torch.device("cpu")
PRETRAINING = [name for name in trainers.__all__
               if issubclass(getattr(trainers, name), (nnUNetTrainer,)) and hasattr(getattr(trainers, name), "method")]
SHORT = {"pretrain": {"epochs": 2, "iterations_per_epoch": 1, "images_per_step": 2, "points_per_image": 10},
         "counterfactual": {"count": 1}, "finetune": {"iterations_per_epoch": 7}}


@pytest.fixture(autouse=True)
def settings(settings_file):
    """Short ones, in a file; a function that changes a section."""
    return settings_file(SHORT)


def bare(name="nnUNetTrainerDVDCL", fold="0", dataset="7", configuration="2d", plans="nnUNetPlans"):
    return bare_trainer(find_trainer(name), dataset, configuration, fold, plans, CPU, lambda *line, **ignored: None)


def real(toy, name="nnUNetTrainerDVDCL", fold=0, configuration="2d"):
    folder = toy / "nnUNet_preprocessed" / DATASET
    plans = {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}
    return getattr(trainers, name)(plans, configuration, fold, json.loads((folder / "dataset.json").read_text()), CPU)


def task_of(trainer):
    method = type(trainer).method
    return build_task(trainer, method, build_objective(trainer, method), Ranks())


@pytest.mark.parametrize("name", PRETRAINING)
def test_the_identity_is_that_of_the_real_trainer(toy, name):
    found, expected = task_of(bare(name)), task_of(real(toy, name))
    assert json.dumps(found.identity) == json.dumps(expected.identity)
    for field in ("folder", "geometry", "patches_per_pass", "device", "workers", "checkpoints", "settings"):
        assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.parametrize("fold, configuration", [("all", "2d"), ("3", "2d_small")])
def test_folders_and_cases_are_those_of_the_real_trainer(toy, fold, configuration):
    found = bare(fold=fold, configuration=configuration)
    expected = real(toy, fold=fold if fold == "all" else int(fold), configuration=configuration)
    for name in ("output_folder", "output_folder_base", "preprocessed_dataset_folder", "fold", "settings",
                 "preprocessed_dataset_folder_base", "configuration_name", "num_iterations_per_epoch"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.do_split() == expected.do_split()


def test_a_plan_that_was_moved_from_another_dataset_counts_as_the_real_trainer_counts_it(toy, change_plan):
    change_plan(lambda plan: plan.update(dataset_name="Dataset008_Other"))
    found, expected = bare(), real(toy)
    assert found.output_folder == expected.output_folder
    assert found.preprocessed_dataset_folder == expected.preprocessed_dataset_folder


def test_the_network_begins_with_the_weights_of_the_real_trainer(toy):
    expected = real(toy)
    expected.initialize()
    found, weights = bare().network.state_dict(), expected.network.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)


def test_nothing_is_written_before_phase_1(toy):
    bare()
    assert not list((toy / "nnUNet_results" / DATASET).iterdir())


def run(*arguments, capsys):
    status = pretrain.main([*arguments, "-device", "cpu"])
    return status, *capsys.readouterr()


def test_phase_1_alone_runs_without_torchrun_and_the_real_trainer_reuses_it(toy, capsys):
    status, output, errors = run("7", "2d", "0", capsys=capsys)
    assert status == 0 and "nnunet_cfcl.pretrain:" not in errors
    assert "Pretraining epoch 1" in output and "Phase 2: nnUNetv2_train 7 2d 0 -tr nnUNetTrainerDVDCL" in output
    assert "-p nnUNetPlans -device cpu" in output
    trainer = real(toy)
    trainer.initialize()
    folder = PretrainingPhase(trainer, type(trainer).method, False, Ranks()).run()
    assert "is reused" in capsys.readouterr().out
    saved = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    own = trainer.network.state_dict()
    assert all(torch.equal(own[key], value) for key, value in saved.items() if ".seg_layers." not in key)


def test_a_second_start_reuses_the_first(capsys):
    run("7", "2d", "0", capsys=capsys)
    status, output, _ = run("7", "2d", "0", capsys=capsys)
    assert status == 0 and "is reused" in output and "Pretraining epoch" not in output


MISTAKES = [
    (["99", "2d", "0"], {}, r"no dataset 99 .*Dataset007_Toy"),
    (["Dataset007_Tyo", "2d", "0"], {}, r"no dataset Dataset007_Tyo .*Dataset007_Toy"),
    (["7", "3d", "0"], {}, r"no configuration 3d \(it has 2d, 2d_small\)"),
    (["7", "2d", "0", "-p", "nnUNetPlan"], {}, r"has no plan nnUNetPlan .*fix: -p nnUNetPlans"),
    (["7", "2d", "first"], {}, r"fold must be a number from 0 or 'all', found 'first'"),
    (["7", "2d", "-1"], {}, r"fold must be a number from 0 or 'all', found '-1'"),
    (["7", "2d", "0", "-tr", "nnUNetTrainerDVD"], {}, r"finds no trainer nnUNetTrainerDVD.*-tr nnUNetTrainerDVDCL"),
    (["7", "2d", "0", "-tr", "nnUNetTrainer"], {}, r"nnUNetTrainer has no pretraining phase"),
    (["7", "2d", "0", "-tr", "nnUNetTrainerCFCLScratch"], {}, r"nnUNetTrainerCFCLScratch has no pretraining phase"),
    (["7", "2d", "0"], {"pretrain": {"enabled": False}}, r"pretrain.enabled is false"),
    (["7", "2d", "0"], {"pretrain": {"epoch": 3}}, r"unknown setting 'pretrain.epoch'.*'pretrain.epochs'"),
    (["7", "2d", "0"], {"pretrain": {"data": "pool"}}, r"imagesUn"),
]


@pytest.mark.parametrize("arguments, changes, message", MISTAKES, ids=[" ".join(a) + str(c) for a, c, _ in MISTAKES])
def test_a_mistake_is_one_clear_line_and_status_1(settings, capsys, arguments, changes, message):
    settings(**changes)
    status, _, errors = run(*arguments, capsys=capsys)
    lines = [line for line in errors.splitlines() if line.startswith("nnunet_cfcl.pretrain: ")]
    assert status == 1 and "Traceback" not in errors
    assert len(lines) == 1 and re.search(message, lines[0]), errors


def test_unset_folders_are_named(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    status, _, errors = run("7", "2d", "0", capsys=capsys)
    assert status == 1 and "nnUNet_results is not set" in errors


def test_a_broken_image_is_named(save_case, capsys):
    for case in (f"toy_{number}" for number in range(6)):
        save_case(case, np.full((1, 1, 24, 24), np.nan))
    status, _, errors = run("7", "2d", "0", capsys=capsys)
    assert status == 1 and re.search(r"nnunet_cfcl.pretrain: case 'toy_\d'", errors)


def test_a_broken_image_that_one_process_meets_ends_the_other_and_torchrun_names_the_first(save_case):
    task = task_of(bare("nnUNetTrainerVADeR"))
    data = PretrainingDataset(task.reader, task.source, task.objective, task.geometry, task.settings, 1)
    broken = data._case(1)  # the second image of the first step is the second process's
    save_case(broken, np.full((1, 1, 24, 24), np.nan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
               "nnunet_cfcl.pretrain", "7", "2d", "0", "-tr", "nnUNetTrainerVADeR", "-device", "cpu"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    output = ended.stdout
    assert ended.returncode == 1
    assert re.findall(r"^nnunet_cfcl.pretrain: (case '\w+')", output, re.MULTILINE) == [f"case '{broken}'"], output
    root_cause = output[output.index("Root Cause"):]
    assert re.search(r"rank\s*: 1 ", root_cause) and "UserError" in root_cause, root_cause


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_and_not_replaced_by_the_cpu(capsys):
    assert pretrain.main(["7", "2d", "0"]) == 1
    assert "process 0 of this host finds 0 CUDA GPUs" in capsys.readouterr().err


def test_the_trainers_class_builds_the_network_and_divides_the_cases():
    class Mine(trainers.nnUNetTrainerDVDCL):
        @staticmethod
        def build_network_architecture(*arguments):
            return torch.nn.Conv2d(1, 2, 1)

        def do_split(self):
            return ["toy_1"], ["toy_2"]

    trainer = bare_trainer(Mine, "7", "2d", "0", "nnUNetPlans", CPU, print)
    assert isinstance(trainer.network, torch.nn.Conv2d)
    assert trainer.do_split() == (["toy_1"], ["toy_2"])
    assert os.path.basename(trainer.output_folder_base) == "Mine__nnUNetPlans__2d"
    with pytest.raises(UserError, match="no decoder of nnU-Net's U-Net kind"):
        PretrainingPhase(trainer, Mine.method, None, Ranks()).run()
