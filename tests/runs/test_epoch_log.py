"""Lines and picture of a run."""

from nnunet_cfcl.pretraining.monitor import plot_progress
from nnunet_cfcl.runs.epoch_log import EpochLog, read_log

HEALTHY = {"loss": 10.0, "uniformity": -2.0, "learning_rate": 1e-3, "alignment": 0.3, "gradient_norm": 1.0}


def test_lines_of_epochs_that_will_be_repeated_are_dropped(tmp_path):
    log = EpochLog(tmp_path, 0, plot_progress)
    for epoch in range(3):
        log.end_epoch(epoch, [HEALTHY, {**HEALTHY, "loss": 12.0}], seconds=2.0, images=16)
    first = read_log(tmp_path / "log.jsonl")[0]
    assert (first["loss"], first["images_per_second"]) == (11, 8)
    assert [line["epoch"] for line in EpochLog(tmp_path, 2, plot_progress).epochs] == [0, 1]
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert EpochLog(None, 0, plot_progress).end_epoch(0, [HEALTHY], 1.0, 4)["images_per_second"] == 4
    assert not list(tmp_path.iterdir())


def test_a_new_run_starts_an_empty_log(tmp_path):
    EpochLog(tmp_path, 0, plot_progress).end_epoch(0, [HEALTHY], 1.0, 1)
    EpochLog(tmp_path, 0, plot_progress)
    assert read_log(tmp_path / "log.jsonl") == []
