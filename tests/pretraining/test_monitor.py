"""What is said about a pretraining: statistics, lines, picture, warnings."""

import math

import pytest
import torch

from nnunet_cfcl.pretraining.dual_view import pair_statistics
from nnunet_cfcl.pretraining.monitor import Monitor, collapse_warning, read_log

HEALTHY = {"loss": 10.0, "uniformity": -2.0, "candidates": 1000.0, "learning_rate": 1e-3, "alignment": 0.3,
           "positives": 1.0, "gradient_norm": 1.0}


def test_identical_embeddings_are_aligned_and_collapsed():
    same = torch.ones(50, 8)
    found = pair_statistics(same, 3 * same, torch.ones(5, 1, 10))
    assert found["alignment"] == pytest.approx(0, abs=1e-6) and found["uniformity"] == pytest.approx(0, abs=1e-5)


def test_statistics_equal_their_definition():
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 6)
    found = pair_statistics(a, b, torch.tensor([[True, False]] * 2)[..., None])
    x, y = (torch.nn.functional.normalize(z, dim=1).double() for z in (a, b))
    distances = [float((x[i] - x[j]).square().sum()) for i in range(40) for j in range(i)]
    assert found["alignment"] == pytest.approx(float((x - y).square().sum(1).mean()), rel=1e-5)
    mean = sum(math.exp(-2 * d) for d in distances) / len(distances)
    assert found["uniformity"] == pytest.approx(math.log(mean), rel=1e-4)
    assert found["positives"] == 0.5


def test_no_valid_point_gives_finite_statistics():
    found = pair_statistics(torch.empty(0, 4), torch.empty(0, 4), torch.zeros(2, 3, 4, dtype=torch.bool))
    assert all(math.isfinite(value) for value in found.values()) and found["positives"] == 0


def test_collapse_is_said_in_words():
    assert collapse_warning(HEALTHY) is None
    assert "collapsed" in collapse_warning({**HEALTHY, "uniformity": -0.01})
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


def test_a_new_run_starts_an_empty_log(tmp_path):
    Monitor(tmp_path).end_epoch(0, [HEALTHY], 1.0, 1)
    Monitor(tmp_path)
    assert read_log(tmp_path / "log.jsonl") == []
