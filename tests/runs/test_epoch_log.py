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


def test_a_log_that_is_damaged_within_is_backed_up_and_reported_and_one_that_is_cut_short_is_not(tmp_path):
    log, said, file = EpochLog(tmp_path, 0, plot_progress), [], tmp_path / "log.jsonl"
    for epoch in range(4):
        log.end_epoch(epoch, [HEALTHY], 1.0, 4)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    EpochLog(tmp_path, 3, plot_progress, said.append)
    assert not said and not (tmp_path / "damaged_log.jsonl").exists()
    damaged = whole.replace(b'{"epoch": 1', b'["epoch": 1')
    file.write_bytes(damaged)
    assert [line["epoch"] for line in EpochLog(tmp_path, 4, plot_progress, said.append).epochs] == [0]
    assert len(said) == 1 and f"{file} is damaged in line 2 of 4" in said[0] and "damaged_log.jsonl" in said[0]
    assert (tmp_path / "damaged_log.jsonl").read_bytes() == damaged and len(read_log(file)) == 1
    # said once: what is left is sound
    EpochLog(tmp_path, 4, plot_progress, said.append)
    assert len(said) == 1 and (tmp_path / "damaged_log.jsonl").read_bytes() == damaged


def test_what_a_kill_left_half_written_is_removed_by_the_next_run_and_nothing_else(tmp_path):
    for name in ("checkpoint_latest.pth.tmp", "checkpoint_latest.pth", "samples_epoch_0002.png.tmp"):
        (tmp_path / name).touch()
    EpochLog(tmp_path, 0, plot_progress)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint_latest.pth", "log.jsonl"}


def test_a_picture_that_cannot_be_drawn_is_reported_and_the_line_is_kept(tmp_path):
    def fail(epochs, file):
        raise MemoryError("too many epochs")

    said = []
    log = EpochLog(tmp_path, 0, fail, said.append)
    log.end_epoch(0, [HEALTHY], 1.0, 4)
    assert said == [f"No picture {tmp_path / 'progress.png'} (MemoryError: too many epochs); the run continues"]
    assert len(read_log(tmp_path / "log.jsonl")) == 1
