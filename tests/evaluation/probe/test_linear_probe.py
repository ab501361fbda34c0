"""Linear probe against scikit-learn and Bayes' rule, Dice against sets of voxels."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from nnunet_cfcl.evaluation.probe.linear_probe import (
    EXPONENTS,
    FeatureScale,
    LinearProbe,
    balanced_weights,
    dice_per_class,
    expected_dice,
)
from tests.evaluation.probe.gaussians import gaussians


def test_balanced_weights_give_every_class_the_same_total_weight():
    weights = balanced_weights(np.array([3, 3, 3, 7]))
    assert weights[:3].sum() == pytest.approx(weights[3]) and weights.mean() == pytest.approx(1)


def test_standardised_features_have_mean_0_and_std_1_over_balanced_classes():
    features, labels = gaussians([[0, 0], [8, 1]], [5000, 50])
    features[:, 1] = 4.5
    scale = FeatureScale.of(features, labels)
    repeated = np.concatenate([features[labels == 0], *[features[labels == 1]] * 100])
    np.testing.assert_allclose(scale(repeated)[:, 0].mean(), 0, atol=1e-9)
    np.testing.assert_allclose(scale(repeated)[:, 0].std(), 1)
    # a constant channel stays finite
    np.testing.assert_allclose(scale(features)[:, 1], 0, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
def test_without_shares_the_probe_equals_scikit_learns_logistic_regression(classes):
    features, labels = gaussians(np.random.default_rng(1).normal(size=(classes, 5)) * 2, [90] * classes)
    features *= [1, 1e-4, 1, 1e3, 1]
    scale = FeatureScale.of(features, labels + 3)
    probe = LinearProbe.fit(features, labels + 3, scale)
    own = LogisticRegression(class_weight="balanced", max_iter=2000).fit(scale(features), labels + 3)
    assert (probe.predict(features) == own.predict(scale(features))).mean() == 1
    assert probe.weight.shape == (classes, 5) and probe.classes.tolist() == list(range(3, 3 + classes))


def test_shares_shift_the_boundary_between_two_gaussians_as_in_bayes_rule():
    features, labels = gaussians([[-1.0], [1.0]], [20000, 20000])
    scale = FeatureScale.of(features, labels)
    equal = LinearProbe.fit(features, labels, scale)
    assert -(equal.bias[1] - equal.bias[0]) / (equal.weight[1] - equal.weight[0])[0] == pytest.approx(0, abs=0.05)
    shares = np.array([0.9, 0.1])
    moved = LinearProbe.fit(features, labels, scale, shares)
    shift = (moved.bias - equal.bias)[1] - (moved.bias - equal.bias)[0]
    # two Gaussians of variance 1 at -1 and 1: the boundary of Bayes' rule is at log(9) / 2
    powers = shift / np.log(shares[1] / shares[0])
    assert np.isclose(EXPONENTS, powers).any() and powers > 0
    assert (moved.weight[1] - moved.weight[0])[0] == pytest.approx(2, abs=0.05)


def test_the_chosen_exponent_has_the_highest_dice_on_a_mixture_with_these_shares():
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


def test_a_rare_class_with_weak_features_is_not_predicted_as_background_everywhere():
    features, labels = gaussians([[0.0], [0.4]], [3000, 3000])
    probe = LinearProbe.fit(features, labels, FeatureScale.of(features, labels), np.array([0.9, 0.1]))
    assert (probe.predict(features) == 1).any()


def test_expected_dice_equals_the_dice_of_an_image_with_these_shares():
    random = np.random.default_rng(0)
    truth, prediction = random.integers(0, 3, 300), random.integers(0, 3, 300)
    shares = np.array([0.7, 0.2, 0.1])
    counts = [np.sum(truth == one) for one in range(3)]
    # copies of every voxel such that the classes have these shares
    copies = np.round(np.prod(counts) * shares[truth] / np.array(counts)[truth]).astype(int)
    image = [np.repeat(part, copies // 10) for part in (truth, prediction)]
    slow = np.mean(dice_per_class(*image, [1, 2]))
    assert expected_dice(truth, prediction, np.arange(3), shares) == pytest.approx(slow, abs=2e-3)


def test_dice_equals_the_dice_of_sets_of_voxels():
    random = np.random.default_rng(0)
    truth, found = random.integers(-1, 4, (5, 6, 7)), random.integers(0, 3, (5, 6, 7))
    scores = dice_per_class(truth, found, [1, 2, 5], ignore=3)
    for label, score in zip([1, 2], scores):
        one, other = ({tuple(v) for v in np.argwhere((image == label) & (truth != 3))} for image in (truth, found))
        assert score == pytest.approx(2 * len(one & other) / (len(one) + len(other)))
    assert np.isnan(scores[2])
