"""The contrast at window borders on maps whose contrast is known."""

import pytest
import torch

from nnunet_cfcl.chromap.seams import seam_contrast


def ramp(*jumps):
    """(2, 1, 4, 20): steps of 1 along x, and twice as much before the voxels ``jumps``."""
    steps = torch.ones(20)
    steps[list(jumps)] += 1
    return torch.stack([steps.cumsum(0), torch.zeros(20)]).view(2, 1, 1, 20).expand(-1, -1, 4, -1)


def test_a_step_twice_as_large_at_the_borders_is_a_contrast_of_two():
    assert seam_contrast(ramp(5, 9), [[], [], [5, 9]]) == pytest.approx(2)


def test_borders_that_cannot_be_seen_have_contrast_one():
    assert seam_contrast(ramp(), [[], [], [5, 9]]) == pytest.approx(1)


def test_without_borders_or_without_any_step_there_is_nothing_to_say():
    assert seam_contrast(ramp(), [[], [], [0, 20]]) is None
    assert seam_contrast(torch.zeros(2, 1, 4, 20), [[], [], [5]]) is None


def test_half_precision_gives_the_same():
    assert seam_contrast(ramp(5).half(), [[], [], [5]]) == pytest.approx(2, rel=1e-3)
