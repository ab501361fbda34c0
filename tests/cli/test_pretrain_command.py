"""``python -m nnunet_cfcl.pretrain``: phase 1 alone, reused by the real trainer; clear errors."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from nnunet_cfcl import trainers
from nnunet_cfcl.cli import pretrain
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.pretraining_phase import PretrainingPhase
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.runs.ranks import Ranks
from tests.toy_dataset import DATASET

CPU = torch.device("cpu")
SHORT = {"pretrain": {"epochs": 2, "iterations_per_epoch": 1, "images_per_step": 2, "points_per_image": 10},
         "counterfactual": {"count": 1}, "finetune": {"iterations_per_epoch": 7}}


@pytest.fixture(autouse=True)
def settings(settings_file):
    """Short ones, in a file; a function that changes a section."""
    return settings_file(SHORT)


def live_trainer(toy):
    folder = toy / "nnUNet_preprocessed" / DATASET
    plans = {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}
    description = json.loads((folder / "dataset.json").read_text())
    return trainers.nnUNetTrainerDVDCL(plans, "2d", 0, description, CPU)


def run(*arguments, capsys):
    status = pretrain.main([*arguments, "-device", "cpu"])
    return status, *capsys.readouterr()


def test_phase_1_alone_runs_without_torchrun_and_the_real_trainer_reuses_it(toy, capsys):
    status, output, errors = run("7", "2d", "0", capsys=capsys)
    assert status == 0 and "nnunet_cfcl.pretrain:" not in errors
    assert "Pretraining epoch 1" in output and "Phase 2: nnUNetv2_train 7 2d 0 -tr nnUNetTrainerDVDCL" in output
    assert "-p nnUNetPlans -device cpu" in output
    trainer = live_trainer(toy)
    trainer.initialize()
    folder = PretrainingPhase(FoldContext.of(trainer), type(trainer).method, False, Ranks()).run(trainer.network)
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
    (["7", "3d", "0"], {}, r"no configuration 3d \(found: 2d, 2d_small\)"),
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
    fold = FoldContext.find(trainers.nnUNetTrainerVADeR, "7", "2d", "0", "nnUNetPlans", CPU, print)
    method = trainers.nnUNetTrainerVADeR.method
    task = build_task(fold, method, build_objective(fold, method), Ranks())
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
