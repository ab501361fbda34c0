"""Pseudo-labels: confidence, agreement, regions, nnU-Net's targets, deep supervision, shares of the classes."""

from __future__ import annotations

import pytest
import torch

from nnunet_cfcl.teacher.pseudo_labels import (
    ClassShares,
    PseudoLabels,
    disagreement,
    from_target,
    pseudo_labels,
    shares,
    trusted,
)


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    """(1, H, voxels) logits whose softmax is given voxel by voxel."""
    return torch.tensor(probabilities, dtype=torch.float64).T[None].log()


def test_a_voxel_is_known_where_its_class_is_confident():
    found = pseudo_labels([logits_of([0.95, 0.05], [0.6, 0.4], [0.08, 0.92])], confidence=0.9)
    assert found.labels.tolist() == [[[0, 0, 1]]]
    assert found.known.tolist() == [[[True, False, True]]]


def test_two_versions_are_averaged_and_must_agree():
    one = logits_of([0.999, 0.001], [0.95, 0.05], [0.49, 0.51])
    other = logits_of([0.9, 0.1], [0.80, 0.20], [0.999, 0.001])
    found = pseudo_labels([one, other], confidence=0.7)
    # the mean of the last voxel is confident, its versions differ
    assert found.labels.tolist() == [[[0, 0, 0]]]
    assert found.known.tolist() == [[[True, True, False]]]
    assert pseudo_labels([one, other], confidence=0.9).known.tolist() == [[[True, False, False]]]
    assert all(torch.equal(a, b) for a, b in zip(found, pseudo_labels([other, one], confidence=0.7)))


def test_a_region_is_known_inside_and_outside():
    probabilities = torch.tensor([[[0.97, 0.5, 0.02], [0.3, 0.91, 0.95]]])
    found = pseudo_labels([probabilities.logit()], confidence=0.9, regions=True)
    assert found.labels.tolist() == [[[True, False, False], [False, True, True]]]
    assert found.known.tolist() == [[[True, False, True], [False, True, True]]]


def test_ignored_voxels_of_a_target_are_unknown():
    target = torch.tensor([[[0, 1, 3, 2]]])
    found = from_target(target, ignore_label=3)
    assert found.labels.tolist() == [[[0, 1, 0, 2]]] and found.known.tolist() == [[[True, True, False, True]]]
    assert from_target(target, None).known.all()
    regions = torch.tensor([[[1, 0, 1], [0, 0, 1], [0, 1, 0]]])  # the last channel marks the ignore label
    found = from_target(regions, ignore_label=3, regions=True)
    assert found.labels.tolist() == [[[True, False, True], [False, False, True]]]
    assert found.known.tolist() == [[[True, False, True]] * 2]
    assert from_target(regions, None, regions=True).labels.shape == (1, 3, 3)


def test_a_lower_resolution_takes_the_nearest_voxel_as_nnunet_does():
    from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

    labels = torch.randint(4, (2, 1, 12, 8), generator=torch.Generator().manual_seed(0))
    found = PseudoLabels(labels, labels > 1).at((6, 4))
    expected = DownsampleSegForDSTransform([[0.5, 0.5]])(segmentation=labels[:, 0])["segmentation"][0]
    assert torch.equal(found.labels[:, 0], expected) and torch.equal(found.known, found.labels > 1)
    assert found.known.dtype == torch.bool


def test_disagreement_is_the_differing_share_of_known_foreground():
    pseudo = PseudoLabels(torch.tensor([[[0, 1, 1, 2, 0]]]), torch.tensor([[[True, True, True, False, True]]]))
    voted = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 1, 1]]), 3).movedim(-1, 1).float()
    # foreground that is known: voxels 1, 2 and 4; 2 and 4 differ
    assert disagreement(voted, pseudo).item() == pytest.approx(2 / 3)
    nothing = PseudoLabels(pseudo.labels, torch.zeros_like(pseudo.known))
    assert disagreement(voted, nothing).item() == 0


def test_shares_count_known_voxels():
    labels, known = torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[True, True, True, False]]])
    assert shares(labels, known, 4).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    regions = torch.tensor([[[True, False], [True, True]]])
    assert shares(regions, torch.tensor([[[True, True], [True, False]]]), 2, regions=True).tolist() == [0.5, 1]


class TestClassShares:
    expected = torch.tensor([0.7, 0.2, 0.1, 0.0])

    def after(self, *found: float, steps: int = 1000) -> ClassShares:
        watched = ClassShares(self.expected, first=1)
        for _ in range(steps):
            watched.update(torch.tensor(found))
        return watched

    def test_shares_within_the_bounds_are_trusted_fully(self):
        watched = self.after(0.5, 0.39, 0.011, 0.2)
        assert watched.trust.tolist() == [1, 1, 1, 1] and watched.outside() == []

    def test_the_labels_of_a_class_of_four_times_its_share_weigh_half_and_no_others(self):
        watched = self.after(0.1, 0.8, 0.1, 0.0)
        assert watched.trust.tolist() == pytest.approx([1, 0.5, 1, 1], abs=1e-3)
        assert watched.outside() == [(1, pytest.approx(4, abs=1e-2))]

    def test_a_class_that_vanishes_is_told_and_changes_no_weight(self):
        watched = self.after(0.8, 0.2, 0.0, 0.0)
        assert watched.trust.tolist() == [1, 1, 1, 1] and [index for index, _ in watched.outside()] == [2]

    def test_background_and_classes_without_manual_labels_are_not_watched(self):
        assert self.after(0.01, 0.2, 0.1, 0.69).trust.tolist() == [1, 1, 1, 1]

    def test_one_odd_step_changes_little(self):
        assert self.after(1.0, 0.0, 0.0, 0.0, steps=1).trust.tolist() == [1, 1, 1, 1]


def test_known_voxels_weigh_as_much_as_their_class_is_trusted():
    labels, known = torch.tensor([[[0, 1, 2, 1]]]), torch.tensor([[[True, True, True, False]]])
    trust = torch.tensor([1.0, 0.5, 0.25])
    assert trusted(labels, known, trust).tolist() == [[[1, 0.5, 0.25, 0]]]
    regions = torch.tensor([[[True, False], [True, True]]])
    known = torch.tensor([[[True, True], [False, True]]])
    assert trusted(regions, known, torch.tensor([0.5, 0.25]), regions=True).tolist() == [[[0.5, 1], [0, 0.25]]]
