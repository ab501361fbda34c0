"""S-MVD-CL: closed forms and the anchors of the foreground."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from nnunet_cfcl.losses import s_mvd_cl, s_mvd_cl_loss

CLASSES = torch.tensor([[[0, 1, 2], [2, 1, 1]], [[2, 0, 0], [1, 2, 0]]])


def test_equal_embeddings_give_log_of_all_others():
    assert s_mvd_cl_loss(torch.ones(2, 2, 3, 5).double(), CLASSES).loss.item() == pytest.approx(math.log(11), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_orthonormal_classes_give_the_closed_form(temperature):
    z = torch.eye(3, dtype=torch.float64)[CLASSES]
    # classes 1 and 2 have four members each of twelve points
    expected = math.log(3 * math.exp(1 / temperature) + 8) - 1 / temperature
    assert s_mvd_cl_loss(z, CLASSES, temperature).loss.item() == pytest.approx(expected, abs=1e-12)


def test_background_anchors_are_masked_one_by_one_and_not_after_the_mean():
    """The reference's experiments averaged first, which left the background in."""
    z = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 0, 1, 2])][None, None]
    labels = torch.tensor([[[0, 0, 1, 1]]])
    foreground, background = math.log(3), math.log(math.e + 2) - 1
    loss = s_mvd_cl_loss(z, labels, temperature=1.0).loss.item()
    assert loss == pytest.approx(foreground, abs=1e-12)
    assert abs(loss - (foreground + background) / 2) > 0.1


def test_a_point_alone_in_its_class_is_left_out():
    z = torch.eye(4, dtype=torch.float64)[None, None]
    found = s_mvd_cl_loss(z, torch.tensor([[[0, 1, 2, 2]]]), temperature=1.0)
    assert (int(found.anchors), int(found.with_positive)) == (3, 2)
    assert found.loss.item() == pytest.approx(math.log(3), abs=1e-12)


def test_points_of_unknown_label_are_invalid():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 2, 3, 4, generator=g, dtype=torch.float64)
    unknown = torch.where(torch.rand(2, 2, 3, generator=g) < 0.3, -1, CLASSES)
    assert (unknown < 0).any()
    torch.testing.assert_close(s_mvd_cl_loss(z, unknown).loss, s_mvd_cl_loss(z, CLASSES, valid=unknown >= 0).loss)


@pytest.mark.parametrize("labels", [CLASSES[:1], CLASSES.float(), CLASSES.bool()])
def test_wrong_labels_are_a_readable_error(labels):
    with pytest.raises(ValueError, match=r"labels must be integers \(2, 2, 3\), got torch"):
        s_mvd_cl_loss(torch.ones(2, 2, 3, 5), labels)


def test_the_documented_example_runs():
    result = doctest.testmod(s_mvd_cl)
    assert result.attempted > 0 and result.failed == 0
