"""Figures of features: closed-form cases, slow oracles, symmetries."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from nnunet_cfcl.evaluation.probe.measures import (
    EXPONENTS,
    FeatureScale,
    LinearProbe,
    balanced_weights,
    class_means,
    dice_per_class,
    distance_between_classes,
    distance_of_means,
    expected_dice,
    gap_by_chance,
    group_gap,
    matched_clusters,
    mean_over_classes,
    spread_within_classes,
)
from nnunet_cfcl.evaluation.statistics import Draws


def gaussians(means, counts, sd=1.0, seed=0):
    """Features of Gaussian classes around the means, labels 0, 1, ..."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(means)), counts)
    return np.asarray(means, float)[labels] + sd * random.normal(size=(len(labels), len(means[0]))), labels


def test_every_class_weighs_the_same():
    weights = balanced_weights(np.array([3, 3, 3, 7]))
    assert weights[:3].sum() == pytest.approx(weights[3]) and weights.mean() == pytest.approx(1)


def test_the_mean_over_classes_is_that_of_the_means_of_the_classes():
    assert mean_over_classes(np.array([1.0, 3.0, 10.0]), np.array([0, 0, 5])) == 6
    assert np.isnan(mean_over_classes(np.empty(0), np.empty(0, int)))


def test_standardised_features_have_mean_0_and_sd_1_as_if_classes_were_equally_frequent():
    features, labels = gaussians([[0, 0], [8, 1]], [5000, 50])
    features[:, 1] = 4.5
    scale = FeatureScale.of(features, labels)
    repeated = np.concatenate([features[labels == 0], *[features[labels == 1]] * 100])
    np.testing.assert_allclose(scale(repeated)[:, 0].mean(), 0, atol=1e-9)
    np.testing.assert_allclose(scale(repeated)[:, 0].std(), 1)
    # a channel that says nothing stays finite
    np.testing.assert_allclose(scale(features)[:, 1], 0, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_without_shares_the_probe_is_scikit_learns_own(classes):
    features, labels = gaussians(np.random.default_rng(1).normal(size=(classes, 5)) * 2, [90] * classes)
    features *= [1, 1e-4, 1, 1e3, 1]
    scale = FeatureScale.of(features, labels + 3)
    probe = LinearProbe.fit(features, labels + 3, scale)
    own = LogisticRegression(class_weight="balanced", max_iter=2000).fit(scale(features), labels + 3)
    assert (probe.predict(features) == own.predict(scale(features))).mean() == 1
    assert probe.weight.shape == (classes, 5) and probe.classes.tolist() == list(range(3, 3 + classes))


def test_shares_move_the_border_between_two_gaussians_as_bayes_rule_does():
    features, labels = gaussians([[-1.0], [1.0]], [20000, 20000])
    scale = FeatureScale.of(features, labels)
    equal = LinearProbe.fit(features, labels, scale)
    assert -(equal.bias[1] - equal.bias[0]) / (equal.weight[1] - equal.weight[0])[0] == pytest.approx(0, abs=0.05)
    shares = np.array([0.9, 0.1])
    moved = LinearProbe.fit(features, labels, scale, shares)
    shift = (moved.bias - equal.bias)[1] - (moved.bias - equal.bias)[0]
    # two Gaussians of variance 1 at -1 and 1: the border of Bayes' rule is at log(9) / 2
    powers = shift / np.log(shares[1] / shares[0])
    assert np.isclose(EXPONENTS, powers).any() and powers > 0
    assert (moved.weight[1] - moved.weight[0])[0] == pytest.approx(2, abs=0.05)


def test_the_exponent_is_that_of_the_highest_dice_on_a_real_mixture():
    random = np.random.default_rng(3)
    features, labels = gaussians([[-1.0], [1.0]], [4000, 4000])
    scale, shares = FeatureScale.of(features, labels), np.array([0.95, 0.05])
    chosen, plain = LinearProbe.fit(features, labels, scale, shares), LinearProbe.fit(features, labels, scale)
    truth = (random.random(200000) < 0.05).astype(int)
    image = np.where(truth, 1.0, -1.0)[:, None] + random.normal(size=(len(truth), 1))
    found = [dice_per_class(truth, np.argmax(image @ plain.weight.T + plain.bias + power * np.log(shares), 1), [1])[0]
             for power in EXPONENTS]
    assert dice_per_class(truth, chosen.predict(image), [1])[0] == pytest.approx(max(found), abs=0.01)
    assert max(found) > found[0] + 0.1


def test_weak_features_of_a_rare_class_are_not_all_called_background():
    features, labels = gaussians([[0.0], [0.4]], [3000, 3000])
    probe = LinearProbe.fit(features, labels, FeatureScale.of(features, labels), np.array([0.9, 0.1]))
    assert (probe.predict(features) == 1).any()


def test_expected_dice_is_that_of_an_image_with_these_shares():
    random = np.random.default_rng(0)
    truth, prediction = random.integers(0, 3, 300), random.integers(0, 3, 300)
    shares = np.array([0.7, 0.2, 0.1])
    counts = [np.sum(truth == one) for one in range(3)]
    # so many copies of every voxel that the classes have these shares
    copies = np.round(np.prod(counts) * shares[truth] / np.array(counts)[truth]).astype(int)
    image = [np.repeat(part, copies // 10) for part in (truth, prediction)]
    slow = np.mean(dice_per_class(*image, [1, 2]))
    assert expected_dice(truth, prediction, np.arange(3), shares) == pytest.approx(slow, abs=2e-3)


def test_clusters_are_called_as_the_classes_they_hold_whatever_the_labels_are():
    features, labels = gaussians([[0, 0], [20, 0], [0, 20]], [40, 50, 60])
    for names in itertools.permutations([2, 5, 9]):
        named = np.array(names)[labels]
        assert (matched_clusters(features, named, 0) == named).all()


def test_the_matching_is_the_best_of_all():
    features, labels = gaussians([[0, 0], [1, 0], [0, 1]], [200, 200, 200])
    found = matched_clusters(features, labels, 0)
    best = max(np.mean(np.array(names)[found] == labels) for names in itertools.permutations(range(3)))
    assert np.mean(found == labels) == best > 0.4


def test_a_class_of_few_voxels_has_a_cluster_of_its_own_where_classes_weigh_the_same():
    # along the second axis the many voxels of the first class are farther from each other than along the first
    features, labels = gaussians([[0.0, 0.0], [6.0, 0.0]], [20000, 20], sd=np.array([0.5, 2.0]))
    weights = balanced_weights(labels)
    right = matched_clusters(features, labels, 0, weights) == labels
    plain = matched_clusters(features, labels, 0) == labels
    assert np.average(right, weights=weights) > np.average(plain, weights=weights) + 0.3


def test_clusters_without_anything_to_tell_are_right_by_chance_alone():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 2000)
    found = matched_clusters(random.normal(size=(4000, 3)), labels, 0)
    assert np.mean(found == labels) == pytest.approx(0.5, abs=0.03)


def test_the_distance_between_classes_is_the_mean_over_all_pairs():
    features, labels = gaussians([[0, 0, 0], [3, 0, 0], [0, 5, 0]], [700, 300, 500])
    weights = balanced_weights(labels)
    pairs = [np.linalg.norm(features[labels == one][:, None] - features[labels == other][None], axis=-1)
             for one, other in itertools.combinations(range(3), 2)]
    drawn = [distance_between_classes(features, labels, np.random.default_rng(seed), weights) for seed in range(20)]
    assert np.mean(drawn) == pytest.approx(np.mean([pair.mean() for pair in pairs]), rel=0.01)
    unweighted = [distance_between_classes(features, labels, np.random.default_rng(seed)) for seed in range(20)]
    assert np.mean(unweighted) == pytest.approx(np.mean(np.concatenate([p.ravel() for p in pairs])), rel=0.01)


def test_one_class_has_no_distance_to_others():
    assert np.isnan(distance_between_classes(np.ones((5, 2)), np.zeros(5, int), np.random.default_rng(0)))
    assert np.isnan(distance_of_means(np.ones((1, 2))))


def test_distance_over_spread_of_gaussian_classes_is_known_and_has_no_unit():
    features, labels = gaussians([[0] * 8, [6] + [0] * 7], [200000, 50000], sd=0.5)
    classes = np.unique(labels)

    def ratio(values):
        means = class_means(values, labels, classes)
        return distance_of_means(means) / spread_within_classes(values, labels, classes, means)

    # means are 6 apart, the spread is 0.5 sqrt(8)
    assert ratio(features) == pytest.approx(6 / (0.5 * np.sqrt(8)), rel=5e-3)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert ratio(3 * features @ rotation + 7) == pytest.approx(ratio(features))


def test_a_class_that_is_not_there_has_no_mean():
    means = class_means(np.ones((2, 3)), np.array([1, 1]), np.array([0, 1]))
    assert np.isnan(means[0]).all() and (means[1] == 1).all()


def test_dice_is_that_of_sets_of_voxels():
    random = np.random.default_rng(0)
    truth, found = random.integers(-1, 4, (5, 6, 7)), random.integers(0, 3, (5, 6, 7))
    scores = dice_per_class(truth, found, [1, 2, 5], ignore=3)
    for label, score in zip([1, 2], scores):
        one, other = ({tuple(v) for v in np.argwhere((image == label) & (truth != 3))} for image in (truth, found))
        assert score == pytest.approx(2 * len(one & other) / (len(one) + len(other)))
    assert np.isnan(scores[2])


def shifted_cases(shift, cases=12, classes=3, seed=0):
    """Class means of cases of two scanners, the second's moved by ``shift`` along an axis; cases differ by 0.1."""
    random = np.random.default_rng(seed)
    means = 0.1 * random.normal(size=(cases, classes, 4))
    groups = ["a" if case < cases // 2 else "b" for case in range(cases)]
    means[cases // 2:, :, 0] += shift
    return means, groups, [f"p{case}" for case in range(cases)]


def test_the_gap_is_the_shift_over_the_unit_and_its_interval_holds_it():
    means, groups, patients = shifted_cases(3.0)
    gap = group_gap(means, groups, patients, unit=2.0)
    assert gap.estimate == pytest.approx(1.5, abs=0.05)
    low, high = Draws(0).interval(gap)
    assert low < 1.5 < high and high - low < 0.2
    assert gap.estimate == pytest.approx(group_gap(means, groups[::-1], patients, 2.0).estimate)


def test_the_gap_is_that_of_a_slow_loop_with_three_groups_and_missing_classes():
    random = np.random.default_rng(0)
    means = random.normal(size=(9, 2, 3))
    means[[0, 5], 1] = np.nan
    groups, patients = list("aabbbcccc"), list("112344567")
    slow = []
    for one, other in itertools.combinations("abc", 2):
        centres = [[np.mean([m[k] for m, g in zip(means, groups) if g == name and np.isfinite(m[k]).all()], axis=0)
                    for k in range(2)] for name in (one, other)]
        slow.append(np.mean([np.linalg.norm(a - b) for a, b in zip(*centres)]))
    gap = group_gap(means, groups, patients, 1.0)
    assert gap.estimate == pytest.approx(np.mean(slow))
    kept = [row for row, patient in enumerate(patients) if patient != "4"]
    again = group_gap(means[kept], [groups[row] for row in kept], [patients[row] for row in kept], 1.0)
    assert gap.without_one[3] == pytest.approx(again.estimate)


@pytest.mark.parametrize(("shift", "is_more"), [(0.0, False), (3.0, True)])
def test_without_an_effect_the_gap_is_what_chance_gives(shift, is_more):
    means, groups, patients = shifted_cases(shift, cases=20)
    chance = gap_by_chance(lambda dealt: group_gap(means, dealt, patients, 1.0).estimate, groups, patients,
                           np.random.default_rng(0))
    estimate = group_gap(means, groups, patients, 1.0).estimate
    assert chance > 0 and (estimate > 2 * chance) == is_more


def test_patients_are_dealt_their_group_whole():
    seen = []
    groups, patients = list("aabbcc"), list("112233")
    gap_by_chance(lambda dealt: seen.append(list(dealt)) or 0.0, groups, patients, np.random.default_rng(0), 30)
    assert all(dealt[0] == dealt[1] and dealt[2] == dealt[3] and sorted(dealt) == groups for dealt in seen)
    assert len({tuple(dealt) for dealt in seen}) > 3
