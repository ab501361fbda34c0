"""S-DVD-CL: closed forms and the anchors of the foreground."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from nnunet_cfcl.losses import dvd_cl_loss, s_dvd_cl, s_dvd_cl_loss

CLASSES = torch.tensor([[0, 1, 2, 2], [1, 1, 2, 0]])


def test_equal_embeddings_give_two_logs_of_all_candidates():
    a = torch.ones(2, 4, 7, dtype=torch.float64)
    assert s_dvd_cl_loss(a, 3 * a, CLASSES, CLASSES).loss.item() == pytest.approx(2 * math.log(8), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_orthonormal_classes_give_the_closed_form(temperature):
    a = torch.eye(3, dtype=torch.float64)[CLASSES]
    # classes 1 and 2 have three members each among the eight candidates
    expected = 2 * (math.log(3 * math.exp(1 / temperature) + 5) - 1 / temperature)
    assert s_dvd_cl_loss(a, a, CLASSES, CLASSES, temperature).loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_class_of_its_own_for_every_point_is_dvd_cl(assert_same):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, 5, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    own = torch.arange(1, 9).reshape(2, 4)
    assert_same(s_dvd_cl_loss(a, b, own, own).loss, dvd_cl_loss(a, b).loss, a, b)


def test_background_anchors_are_masked_one_by_one_and_not_after_the_mean():
    """The reference's experiments averaged first, which left the background in."""
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)[None]
    labels = torch.tensor([[0, 0, 1]])
    # the one foreground anchor: its positive is itself in the other view, two orthogonal background points
    foreground = math.log(math.e + 2) - 1
    background = math.log(2 * math.e + 1) - 1
    loss = s_dvd_cl_loss(a, a, labels, labels, temperature=1.0).loss.item()
    assert loss == pytest.approx(2 * foreground, abs=1e-12)
    assert abs(loss - 2 * (foreground + 2 * background) / 3) > 0.1


def test_any_class_can_be_the_background():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    swapped = torch.tensor([7, 0, 2])[CLASSES]
    torch.testing.assert_close(
        s_dvd_cl_loss(a, b, swapped, swapped, background=7).loss, s_dvd_cl_loss(a, b, CLASSES, CLASSES).loss)


def test_a_class_missing_in_the_other_view_leaves_its_anchors_out(objectives, draw_problem, assert_same):
    a, b = torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None].flip(1)
    found = s_dvd_cl_loss(a, b, torch.tensor([[1, 2, 0, 0]]), torch.tensor([[1, 3, 0, 0]]), 1.0)
    assert (int(found.anchors), int(found.with_positive)) == (4, 2)
    assert found.loss.item() == pytest.approx(2 * math.log(math.e + 3), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_are_taken(dtype):
    a = torch.eye(3)[CLASSES]
    labels = CLASSES.to(dtype)
    torch.testing.assert_close(s_dvd_cl_loss(a, a, labels, labels).loss, s_dvd_cl_loss(a, a, CLASSES, CLASSES).loss)


@pytest.mark.parametrize("labels", [CLASSES[:1], CLASSES.float(), CLASSES.bool()])
def test_wrong_labels_of_either_view_are_a_readable_error(labels):
    a = torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match=r"labels_b must be integers \(2, 4\), got torch"):
        s_dvd_cl_loss(a, a, CLASSES, labels)
    with pytest.raises(ValueError, match=r"labels_a must be integers \(2, 4\), got torch"):
        s_dvd_cl_loss(a, a, labels, CLASSES)


def test_the_documented_example_runs():
    result = doctest.testmod(s_dvd_cl)
    assert result.attempted > 0 and result.failed == 0
