"""The real commands on disks that are really full or read-only: one clear line, and nothing that was there is lost."""

from __future__ import annotations

import pytest

from nnunet_cfcl.data.pool.manifest import manifest_file, pool_folder, read_manifest
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from tests.end_to_end.conftest import PLANS, TRAINER
from tests.faults.disks import fill, read_only, small_disk

pytestmark = pytest.mark.end_to_end

DATASET = "Dataset012_ChestXraysPool"
POOL = ("nnunet_cfcl", "pool", "-d", "12", "-c", "2d", "-p", PLANS, "-np", "1")
TRAIN = ("nnUNetv2_train", "12", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
#: Enough for nnU-Net's log, too little for a case or a checkpoint.
ROOM = 12_000


def _only_line(output: str) -> str:
    """The command's one error."""
    assert "Traceback" not in output, output
    (line,) = (line for line in output.splitlines() if line.startswith("nnunet_cfcl pool: "))
    return line


def test_the_pool_on_a_read_only_and_on_a_full_disk_is_one_line_and_is_gone_on_with(
        chest_xrays_with_pool, run_here, tmp_path):
    nnunet = chest_xrays_with_pool.copy(tmp_path / "copy")
    folder = pool_folder(nnunet.folder("preprocessed") / DATASET / "nnUNetPlans_2d")
    changed = sorted((nnunet.folder("raw") / DATASET / "imagesUn").iterdir())[0]
    changed.touch()  # there is something to do
    with read_only(nnunet.folder("preprocessed")):
        line = _only_line(run_here(nnunet, *POOL, status=1))
        assert "cannot write" in line and "Read-only file system" in line
    before = read_manifest(folder)
    assert before is not None and before.complete and len(before.cases) == 16
    disk = tmp_path / "disk"
    with small_disk(disk, 20_000):
        moved = nnunet.copy(disk / "copy")
        folder = pool_folder(moved.folder("preprocessed") / DATASET / "nnUNetPlans_2d")
        for file in folder.iterdir():
            file.unlink()
        manifest_file(folder).unlink()
        fill(disk, ROOM)
        line = _only_line(moved.run(*POOL, status=1))
        assert "cannot write" in line and "No space left on device" in line and "free some space" in line
        (disk / "filling").unlink()
        run_here(moved, *POOL)
        after = read_manifest(folder)
        assert after is not None and after.complete and after.content() == before.content()


@pytest.mark.nightly
def test_a_training_on_a_full_disk_names_its_checkpoint_keeps_the_earlier_one_and_goes_on_with_room(
        chest_xrays_with_pool, tmp_path):
    nnunet = chest_xrays_with_pool.copy(tmp_path / "copy")
    nnunet.settings(pretrain={"epochs": 4})
    with small_disk(nnunet.folder("results"), 300_000) as disk:
        nnunet.run_until("Pretraining epoch 1", *TRAIN)
        latest = nnunet.fold(DATASET, "2d") / "cfcl/pretraining/checkpoint_latest.pth"
        epoch = load_checkpoint(latest)["epoch"]
        for unfinished in latest.parent.glob("*.tmp"):  # would be room for the next one
            unfinished.unlink()
        fill(disk, 200_000)
        output = nnunet.run(*TRAIN, "--c", status=1)
        assert f"cannot write {latest} (No space left on device); what was there before is as it was" in output
        assert "fix: free some space there" in output
        assert load_checkpoint(latest)["epoch"] == epoch
        assert [file.name for file in latest.parent.glob("checkpoint*")] == [latest.name]
        (disk / "filling").unlink()
        output = nnunet.run(*TRAIN, "--c")
        assert f"Pretraining resumes after epoch {epoch - 1}" in output and "Training done" in output
