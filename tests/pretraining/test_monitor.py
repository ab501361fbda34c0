"""What is said about a pretraining: statistics, lines, picture, warnings."""

import math

from nnunet_cfcl.pretraining.monitor import Monitor, collapse_warning, read_log

HEALTHY = {"loss": 10.0, "uniformity": -2.0, "uninformed": 2 * math.log(1000), "learning_rate": 1e-3, "alignment": 0.3,
           "positives": 1.0, "gradient_norm": 1.0}


def test_collapse_is_said_in_words():
    assert collapse_warning(HEALTHY) is None
    assert "collapsed" in collapse_warning({**HEALTHY, "uniformity": -0.01})
    assert collapse_warning({"loss": 3.0}) is None
    assert "guessing" in collapse_warning({**HEALTHY, "loss": 2 * math.log(1000)})


def test_lines_of_epochs_that_will_be_repeated_are_dropped(tmp_path):
    monitor = Monitor(tmp_path)
    for epoch in range(3):
        monitor.end_epoch(epoch, [HEALTHY, {**HEALTHY, "loss": 12.0}], seconds=2.0, images=16)
    first = read_log(tmp_path / "log.jsonl")[0]
    assert (first["loss"], first["images_per_second"]) == (11, 8)
    assert [line["epoch"] for line in Monitor(tmp_path, first_epoch=2).epochs] == [0, 1]
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Monitor(None).end_epoch(0, [HEALTHY], 1.0, 4)["images_per_second"] == 4
    assert not list(tmp_path.iterdir())


def test_a_new_run_starts_an_empty_log(tmp_path):
    Monitor(tmp_path).end_epoch(0, [HEALTHY], 1.0, 1)
    Monitor(tmp_path)
    assert read_log(tmp_path / "log.jsonl") == []
