"""Every kind of file on a disk that is really full or read-only: the earlier one stays good, the error names it."""

from __future__ import annotations

import hashlib
import resource
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.nifti import Geometry, write_embedding, write_rgb_volume
from nnunet_cfcl.chromap.picture import write_png
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.files.atomic import WriteError, write_text_atomically
from nnunet_cfcl.pretraining.monitor import plot_progress
from nnunet_cfcl.runs.checkpoint import load_checkpoint, save_checkpoint
from nnunet_cfcl.runs.epoch_log import EpochLog, read_log
from nnunet_cfcl.trainers.export_stock import _write_model_files
from tests.faults.disks import fill, read_only, small_disk

NOISE = np.random.default_rng(0)
LINE = {"loss": 10.0, "uniformity": -2.0, "learning_rate": 1e-3, "alignment": 0.3, "gradient_norm": 1.0}


def checkpoint(folder):
    save_checkpoint({"weights": [torch.rand(3000) for _ in range(100)]}, folder / "checkpoint_latest.pth")


def counterfactual(folder):
    store = CounterfactualStore(folder, {"interventions": ["scanner"], "source": "test"})
    store.path("case", "scanner").parent.mkdir(exist_ok=True)
    store.write("case", "scanner", NOISE.random((1, 8, 64, 64), np.float32))


def counterfactual_in_slabs(folder):
    store = CounterfactualStore(folder, {"interventions": ["scanner", "disease"], "source": "test"})
    store.path("case", "scanner").parent.mkdir(exist_ok=True)
    slabs = (NOISE.random((2, 1, 4, 64, 64), np.float32) for _ in range(4))
    store.write_slabs("case", store.interventions, (1, 16, 64, 64), slabs, (1, 4, 64, 64), (1, 4, 32, 32))


def color_space(folder):
    ColorSpace(torch.rand(8, 16), torch.rand(8), torch.rand(2000, 8), torch.rand(2000, 2), "umap").save(
        folder / "chromap_space.npz")


def map_of_a_volume(folder):
    colors = NOISE.integers(0, 255, (16, 64, 64, 3), np.uint8)
    write_rgb_volume(folder / "case.nii.gz", colors, Geometry.of_affine(np.eye(4)))


def coordinates(folder):
    write_embedding(folder / "case_embedding.nii.gz", NOISE.uniform(-0.7, 0.7, (2, 8, 64, 64)),
                    Geometry.of_affine(np.eye(4)))


def map_of_a_picture(folder):
    write_png(folder / "case.png", NOISE.integers(0, 255, (256, 256, 3), np.uint8))


@cache
def trained_model():
    """A folder, on another disk, whose files are to be exported."""
    folder = TemporaryDirectory()
    for name in ("dataset.json", "plans.json"):
        Path(folder.name, name).write_text("x" * 200_000)
    return folder


def exported_model(folder):
    _write_model_files(Path(trained_model().name), folder)


def config(folder):
    write_text_atomically(folder / "config.json", "x" * 200_000)


WRITERS = [checkpoint, counterfactual, counterfactual_in_slabs, color_space, map_of_a_volume, coordinates,
           map_of_a_picture, exported_model, config]
#: Bytes that are left on the disk: it is full, or becomes full while a file is written.
ROOMS = (0, 40_000)


def state_of(folder):
    """Checksum of every file."""
    return {file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in folder.rglob("*") if file.is_file() and file.name != "filling"}


@contextmanager
def refused(folder, words):
    """Within the block something is written that has to be refused; the files are as they were then."""
    before = state_of(folder)
    with pytest.raises(WriteError) as error:
        yield
    message = str(error.value)
    assert message.startswith(f"cannot write {folder}") and words in message and "\n" not in message
    assert before and state_of(folder) == before


@contextmanager
def no_file_longer_than(size):
    """The operating system refuses to write more into any file; other than a full disk, nobody need be root for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_is_cut_short_is_never_taken_for_a_good_one(tmp_path, write):
    write(tmp_path)
    with refused(tmp_path, "ulimit -f"), no_file_longer_than(40_000):
        write(tmp_path)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_named_and_the_earlier_file_stays_good(tmp_path, write, room):
    with small_disk(tmp_path / "disk", 4000) as disk:
        write(disk)
        fill(disk, room)
        with refused(disk, "free some space"):
            write(disk)


@pytest.mark.parametrize("write", WRITERS)
def test_a_read_only_folder_is_named(tmp_path, write):
    write(tmp_path)
    with read_only(tmp_path), refused(tmp_path, "mount the disk writable"):
        write(tmp_path)


def test_a_picture_that_cannot_be_written_costs_a_word_and_a_line_of_the_log_is_refused(tmp_path):
    said = []
    log = EpochLog(tmp_path, 0, plot_progress, said.append)
    with no_file_longer_than(10_000):
        log.end_epoch(0, [LINE], seconds=1.0, images=4)
    assert len(said) == 1 and "No picture" in said[0] and "progress.png" in said[0]
    with pytest.raises(WriteError, match="log.jsonl"), no_file_longer_than(50):
        log.end_epoch(1, [LINE], seconds=1.0, images=4)
    assert [line["epoch"] for line in read_log(tmp_path / "log.jsonl")] == [0]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_checkpoint_that_could_not_be_replaced_is_still_read(tmp_path):
    file = tmp_path / "checkpoint_latest.pth"
    save_checkpoint({"epoch": 1}, file)
    with pytest.raises(WriteError), no_file_longer_than(5000):
        save_checkpoint({"epoch": 2, "weights": torch.rand(10_000)}, file)
    assert load_checkpoint(file) == {"epoch": 1}
