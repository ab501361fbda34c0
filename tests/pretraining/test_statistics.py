"""Alignment and uniformity against their definitions."""

import math

import pytest
import torch

from nnunet_cfcl.losses import dvd_cl_loss, s_mvd_cl_loss
from nnunet_cfcl.pretraining.statistics import contrast_statistics, uniformity


def test_alignment_is_the_mean_squared_distance_of_the_normalised_pairs_of_both_directions():
    a, b = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [(p / p.norm() - q / q.norm()).square().sum() for p, q in zip(a.view(-1, 4), b.view(-1, 4), strict=True)]
    found = contrast_statistics([dvd_cl_loss(a, b)], a.flatten(0, 1), 1.0, 0.7)
    assert found["alignment"] == pytest.approx(float(torch.stack(expected).mean()))
    opposite = contrast_statistics([dvd_cl_loss(a, -a)], a.flatten(0, 1), 1.0, 0.7)
    assert opposite["alignment"] == pytest.approx(4) and opposite["positives"] == 1


def test_alignment_of_a_pool_is_the_mean_over_anchors_of_the_mean_over_their_positives():
    z = torch.randn(1, 1, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[1, 1, 1, 2, 2, 3]]])
    unit = [row / row.norm() for row in z[0, 0]]
    groups = [[1, 2], [0, 2], [0, 1], [4], [3]]  # the last point has no positive
    means = [sum(float((unit[n] - unit[p]).square().sum()) for p in group) / len(group)
             for n, group in enumerate(groups)]
    found = contrast_statistics([s_mvd_cl_loss(z, labels)], z[0, 0], 1.0, 0.7)
    assert found["alignment"] == pytest.approx(sum(means) / 5) and found["positives"] == pytest.approx(5 / 6)


def test_nothing_to_compare_gives_finite_statistics():
    z = torch.randn(2, 3, 4)
    found = contrast_statistics([dvd_cl_loss(z, z, valid=torch.zeros(2, 3).bool())], z[:0, 0], 0.0, 0.7)
    assert found == {"positives": 0, "alignment": 0, "uniformity": 0, "uninformed": 0}


def test_uniformity_is_the_log_of_the_mean_potential_of_all_pairs():
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    unit = [row / row.norm() for row in z]
    potentials = [math.exp(-2 * float((p - q).square().sum())) for i, p in enumerate(unit) for q in unit[:i]]
    assert uniformity(z) == pytest.approx(math.log(sum(potentials) / len(potentials)))
    assert uniformity(torch.ones(5, 4)) == pytest.approx(0, abs=1e-5)
    assert uniformity(z[:1]) == uniformity(z[:0]) == 0


def test_uniformity_compares_a_sample_that_is_spread_over_all_embeddings():
    # the first half is all the same: a sample of the front alone would look collapsed
    z = torch.cat([torch.ones(30, 8), torch.randn(30, 8, generator=torch.Generator().manual_seed(2))])
    assert uniformity(z, sample=40) == pytest.approx(uniformity(z), abs=0.1)
    assert uniformity(z, sample=40) < -0.5
