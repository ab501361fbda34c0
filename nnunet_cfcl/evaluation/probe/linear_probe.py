"""Linear probe of frozen features, and the Dice of its label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from nnunet_cfcl.evaluation.statistics import Numbers

Labels = NDArray[np.integer]

#: Inverse strength of the L2 penalty, scikit-learn's default: with thousands of voxels it only keeps the weights of
#: collinear features from growing.
PENALTY = 1.0
#: Exponents of the class prior, see `LinearProbe.fit`.
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def balanced_weights(labels: Labels) -> Numbers:
    """Weights (N,) with mean 1 that give every class the same total weight."""
    classes, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(len(labels) / (len(classes) * counts[codes.reshape(-1)]), np.float64)


@dataclass(frozen=True)
class FeatureScale:
    """Standardisation of every channel to mean 0 and standard deviation 1, over class-balanced voxels.

    Attributes:
        mean: (F,) mean of every channel.
        std: (F,) standard deviation of every channel; 1 for a constant channel.
    """

    mean: Numbers
    std: Numbers

    @classmethod
    def of(cls, features: Numbers, labels: Labels) -> FeatureScale:
        """Estimate the scale from voxels of all classes."""
        weights = balanced_weights(labels)
        mean = np.average(features, axis=0, weights=weights)
        std = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=weights))
        return cls(mean, np.where(std > 1e-12 * np.maximum(1, np.abs(mean)), std, 1.0))

    def __call__(self, features: Numbers) -> Numbers:
        """Standardise features (N, F)."""
        return np.asarray((features - self.mean) / self.std)


@dataclass(frozen=True)
class LinearProbe:
    """Linear classifier of features, equivalent to a last segmentation layer.

    Attributes:
        classes: (K,) labels, ascending.
        weight: (K, F), for features that are not standardised.
        bias: (K,).
    """

    classes: Labels
    weight: Numbers
    bias: Numbers

    @classmethod
    def fit(cls, features: Numbers, labels: Labels, scale: FeatureScale, shares: Numbers | None = None) -> LinearProbe:
        """Fit a class-balanced multinomial logistic regression on standardised features.

        The drawn voxels are class-balanced, a whole image is not: ``exponent * log(shares)`` is added to the scores. An
        exponent of 1 is Bayes' rule, with which rare classes hardly ever win where features are weak; 0 ignores the
        prior. The exponent of `EXPONENTS` with the highest expected Dice on these voxels is chosen.

        Args:
            features: (N, F).
            labels: (N,) with two classes or more.
            scale: standardisation of the features.
            shares: (K,) share of each class in all voxels, above 0, in the order of the labels; the first class is
                background. None: no prior is added.
        """
        found = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=2000).fit(scale(features), labels)
        weight, bias = found.coef_, found.intercept_
        if len(weight) == 1:
            # with two classes scikit-learn gives the score of the second alone, that of the first being 0
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        weight = weight / scale.std
        probe = cls(np.asarray(found.classes_), weight, bias - weight @ scale.mean)
        if shares is None:
            return probe
        shifted = [cls(probe.classes, weight, probe.bias + power * np.log(shares)) for power in EXPONENTS]
        return max(shifted, key=lambda one: expected_dice(labels, one.predict(features), probe.classes, shares))

    def predict(self, features: Numbers) -> Labels:
        """Predict the class with the highest score (N,)."""
        return np.asarray(self.classes[np.argmax(features @ self.weight.T + self.bias, axis=1)])


def dice_per_class(truth: Labels, prediction: Labels, classes: Sequence[int], ignore: int | None = None) -> Numbers:
    """Dice of two label maps.

    Args:
        truth: labels; below 0 is background, as in nnU-Net's training.
        prediction: labels, of the same shape.
        classes: K classes to score.
        ignore: label of voxels without ground truth, which are left out.

    Returns:
        (K,) values between 0 and 1; NaN for a class in neither map.
    """
    if ignore is not None:
        known = truth != ignore
        truth, prediction = truth[known], prediction[known]
    scores = []
    for label in classes:
        size = np.count_nonzero(truth == label) + np.count_nonzero(prediction == label)
        both = np.count_nonzero((truth == label) & (prediction == label))
        scores.append(2 * both / size if size else np.nan)
    return np.array(scores, np.float64)


def expected_dice(truth: Labels, prediction: Labels, classes: Labels, shares: Numbers) -> float:
    """Mean Dice, over all classes but the first, that drawn voxels predict for an image with given class shares.

    Args:
        truth: (N,) labels of voxels of all classes.
        prediction: (N,) predicted labels.
        classes: (K,) ascending.
        shares: (K,) share of each class in all voxels.
    """
    rates = np.array([[np.mean(prediction[truth == one] == other) for other in classes] for one in classes])
    joint = rates * np.asarray(shares)[:, None] / np.sum(shares)
    return float(np.mean((2 * np.diag(joint) / (joint.sum(0) + joint.sum(1)))[1:]))
