"""Metrics of features: closed-form cases, slow oracles, symmetries."""

import itertools

import numpy as np
import pytest

from nnunet_cfcl.evaluation.probe.linear_probe import balanced_weights
from nnunet_cfcl.evaluation.probe.metrics import (
    class_means,
    distance_between_classes,
    distance_of_means,
    matched_clusters,
    mean_over_classes,
    std_within_classes,
)
from tests.evaluation.probe.gaussians import gaussians


def test_mean_over_classes_averages_the_class_means():
    assert mean_over_classes(np.array([1.0, 3.0, 10.0]), np.array([0, 0, 5])) == 6
    assert np.isnan(mean_over_classes(np.empty(0), np.empty(0, int)))


def test_separate_clusters_are_matched_to_their_classes_for_any_label_numbers():
    features, labels = gaussians([[0, 0], [20, 0], [0, 20]], [40, 50, 60])
    for names in itertools.permutations([2, 5, 9]):
        named = np.array(names)[labels]
        assert (matched_clusters(features, named, 0) == named).all()


def test_the_matching_is_optimal_over_all_permutations():
    features, labels = gaussians([[0, 0], [1, 0], [0, 1]], [200, 200, 200])
    found = matched_clusters(features, labels, 0)
    best = max(np.mean(np.array(names)[found] == labels) for names in itertools.permutations(range(3)))
    assert np.mean(found == labels) == best > 0.4


def test_balanced_weights_give_a_rare_class_its_own_cluster():
    # the frequent class varies more along the second axis than the classes are apart along the first
    features, labels = gaussians([[0.0, 0.0], [6.0, 0.0]], [20000, 20], sd=np.array([0.5, 2.0]))
    weights = balanced_weights(labels)
    right = matched_clusters(features, labels, 0, weights) == labels
    plain = matched_clusters(features, labels, 0) == labels
    assert np.average(right, weights=weights) > np.average(plain, weights=weights) + 0.3


def test_clusters_of_uninformative_features_are_at_chance_level():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 2000)
    found = matched_clusters(random.normal(size=(4000, 3)), labels, 0)
    assert np.mean(found == labels) == pytest.approx(0.5, abs=0.03)


def test_distance_between_classes_estimates_the_mean_over_all_pairs():
    features, labels = gaussians([[0, 0, 0], [3, 0, 0], [0, 5, 0]], [700, 300, 500])
    weights = balanced_weights(labels)
    pairs = [np.linalg.norm(features[labels == one][:, None] - features[labels == other][None], axis=-1)
             for one, other in itertools.combinations(range(3), 2)]
    drawn = [distance_between_classes(features, labels, np.random.default_rng(seed), weights) for seed in range(20)]
    assert np.mean(drawn) == pytest.approx(np.mean([pair.mean() for pair in pairs]), rel=0.01)
    unweighted = [distance_between_classes(features, labels, np.random.default_rng(seed)) for seed in range(20)]
    assert np.mean(unweighted) == pytest.approx(np.mean(np.concatenate([p.ravel() for p in pairs])), rel=0.01)


def test_distances_with_one_class_are_nan():
    assert np.isnan(distance_between_classes(np.ones((5, 2)), np.zeros(5, int), np.random.default_rng(0)))
    assert np.isnan(distance_of_means(np.ones((1, 2))))


def test_distance_over_std_of_gaussian_classes_is_known_and_invariant_to_scale_and_rotation():
    features, labels = gaussians([[0] * 8, [6] + [0] * 7], [200000, 50000], sd=0.5)
    classes = np.unique(labels)

    def ratio(values):
        means = class_means(values, labels, classes)
        return distance_of_means(means) / std_within_classes(values, labels, classes, means)

    # class means are 6 apart, the std within a class is 0.5 sqrt(8)
    assert ratio(features) == pytest.approx(6 / (0.5 * np.sqrt(8)), rel=5e-3)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert ratio(3 * features @ rotation + 7) == pytest.approx(ratio(features))


def test_the_mean_of_an_absent_class_is_nan():
    means = class_means(np.ones((2, 3)), np.array([1, 1]), np.array([0, 1]))
    assert np.isnan(means[0]).all() and (means[1] == 1).all()
