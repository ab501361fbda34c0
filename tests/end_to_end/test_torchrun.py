"""Real volumes, phase 1 by PyTorch's own launcher in two processes, one of them killed; then nnU-Net's own command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

DATASET, PLANS = "Dataset004_Hippocampus", "shortPlans"
# no other test trains it: the folders of nnU-Net are shared
TRAINER = "nnUNetTrainerMVDCL"
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2"]


def pretrain(*extra: str, plans: str = PLANS) -> list[str]:
    return ["-m", "nnunet_cfcl.pretrain", "4", "3d_fullres", "0", "-tr", TRAINER, "-p", plans, "-device", "cpu", *extra]


def workers(torchrun: int) -> list[int]:
    """Process numbers of the ranks, youngest last."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=True).stdout
    return sorted(int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent) == torchrun)


def run_and_kill_a_rank(nnunet, checkpoint: Path, *command: str) -> tuple[str, int]:
    """The output and the status of a command, one of whose ranks is killed as soon as the first epoch is saved."""
    process = nnunet.start(*command)
    timer = threading.Timer(600, process.kill)
    timer.start()
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if "Pretraining epoch 0" in line:
            assert checkpoint.exists()  # what is reported is saved
            os.kill(workers(process.pid)[-1], signal.SIGKILL)
    timer.cancel()
    return output, process.wait()


@pytest.fixture(scope="module")
def pretrained(hippocampus) -> tuple[Path, str]:
    """The fold after phase 1 in two processes, and what they printed."""
    hippocampus.settings(finetune={"epochs": 1, "iterations_per_epoch": 1})
    hippocampus.variables["nnUNet_n_proc_DA"] = "0"
    try:
        fold = hippocampus.fold(DATASET, "3d_fullres", TRAINER)
        latest = fold / "cfcl/pretraining/checkpoint_latest.pth"
        output, status = run_and_kill_a_rank(hippocampus, latest, *TORCHRUN, "--max-restarts", "1", *pretrain())
    finally:
        del hippocampus.variables["nnUNet_n_proc_DA"]
    assert status == 0, output[-4000:]
    return fold, output


def test_a_lost_process_is_started_again_and_the_run_goes_on_after_its_last_epoch(pretrained):
    fold, output = pretrained
    assert "MVD-CL pretraining, 2 epochs" in output and "2 processes" in output
    assert output.count("Pretraining epoch 0") == 1
    assert "Pretraining resumes after epoch 0" in output and "Pretraining epoch 1" in output
    lines = (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


def test_the_files_are_those_of_a_run_in_one_process(pretrained):
    fold, _ = pretrained
    assert {file.name for file in (fold / "cfcl/pretraining").iterdir()} == {
        "checkpoint_final.pth", "log.jsonl", "progress.png", "views.png"
    }
    assert not list(fold.rglob("*.tmp"))


def test_the_stock_command_takes_over_for_phase_2(pretrained, hippocampus):
    fold, _ = pretrained
    before = (fold / "cfcl/pretraining/checkpoint_final.pth").read_bytes()
    command = ["nnUNetv2_train", "4", "3d_fullres", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu"]
    output = hippocampus.run_until("Epoch 0", *command)
    assert "is reused" in output and "Pretraining epoch" not in output
    assert (fold / "cfcl/pretraining/checkpoint_final.pth").read_bytes() == before
    assert (fold / "checkpoint_latest.pth").exists()


@pytest.mark.nightly
def test_a_mistake_is_said_once_and_ends_all_processes(hippocampus):
    output = hippocampus.run(*TORCHRUN, *pretrain(plans="shortPlan"), status=1)
    said = [line for line in output.splitlines() if line.startswith("nnunet_cfcl.pretrain: ")]
    assert len(said) == 1 and "has no plan shortPlan" in said[0] and "-p shortPlans" in said[0]
