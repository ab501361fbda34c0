"""Pictures of phase 3: drawn from any log and any patch, with names as they are."""

import math

import pytest
import torch
from matplotlib.image import imread

from nnunet_cfcl.teacher.monitor import plot_progress, plot_pseudo_labels
from nnunet_cfcl.teacher.pseudo_labels import PseudoLabels

LINE = {"epoch": 0, "loss": 0.5, "pool_loss": 0.3, "known": 0.9, "known_GE $2$ $3$": math.nan, "share_background": 0.8,
        "share_lung_left": 0.2, "disagreement": 0.1, "dice": 0.9, "weight": 1, "learning_rate": 1e-3,
        "gradient_norm": 2.0, "seconds": 3}


@pytest.mark.parametrize("lines", [[LINE], [LINE, {**LINE, "epoch": 1, "share_lung_left": 0}],
                                   [{"epoch": 0, "loss": 1, "learning_rate": 1, "weight": 0, "gradient_norm": 1}]])
def test_curves_are_drawn(tmp_path, lines):
    plot_progress(lines, tmp_path / "progress.png")
    assert imread(tmp_path / "progress.png").shape[1] > 1000


@pytest.mark.parametrize("shape", [(12, 14), (5, 12, 14)])
def test_pseudo_labels_of_slices_and_volumes_are_drawn(tmp_path, shape):
    labels = torch.randint(3, (2, 1, *shape))
    plot_pseudo_labels(torch.rand(2, 1, *shape), torch.rand(2, 1, *shape), PseudoLabels(labels, labels > 0),
                       tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png").std() > 0
