"""What frozen features tell: a linear probe, clusters, distances between classes, counterfactuals and scanners.

Features are (N, F), labels (N,) whole numbers. All is a function of its arguments: what is random has a seed or is
drawn from a generator that is handed in, so that the same voxels of two networks are treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression

from nnunet_cfcl.evaluation.statistics import Numbers, PatientSums

Labels = NDArray[np.integer]

#: Inverse strength of the linear probe's L2 penalty, scikit-learn's own: with thousands of voxels it only keeps the
#: weights of features that say the same from growing.
PENALTY = 1.0
#: Of the classes' shares, see `LinearProbe.fit`.
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Resamples whose class means are in memory at the same time.
AT_ONCE = 250


def balanced_weights(labels: Labels) -> Numbers:
    """(N,) weights with mean 1 in which every class weighs the same."""
    classes, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(len(labels) / (len(classes) * counts[codes.reshape(-1)]), np.float64)


def mean_over_classes(values: Numbers, labels: Labels) -> float:
    """Mean over the classes that are there of the mean of their values (N,); NaN without any."""
    means = [float(values[labels == one].mean()) for one in np.unique(labels)]
    return float(np.mean(means)) if means else float("nan")


@dataclass(frozen=True)
class FeatureScale:
    """Brings every channel to mean 0 and standard deviation 1, for voxels in which classes weigh the same.

    Attributes:
        centre, spread: (F,); the spread of a constant channel is 1.
    """

    centre: Numbers
    spread: Numbers

    @classmethod
    def of(cls, features: Numbers, labels: Labels) -> FeatureScale:
        """From voxels of all classes."""
        weights = balanced_weights(labels)
        centre = np.average(features, axis=0, weights=weights)
        spread = np.sqrt(np.average((features - centre) ** 2, axis=0, weights=weights))
        return cls(centre, np.where(spread > 1e-12 * np.maximum(1, np.abs(centre)), spread, 1.0))

    def __call__(self, features: Numbers) -> Numbers:
        """(N, F) standardised."""
        return np.asarray((features - self.centre) / self.spread)


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features, as a last segmentation layer is one.

    Attributes:
        classes: (K,) labels, ascending.
        weight: (K, F), of features as the network gives them.
        bias: (K,).
    """

    classes: Labels
    weight: Numbers
    bias: Numbers

    @classmethod
    def fit(cls, features: Numbers, labels: Labels, scale: FeatureScale, shares: Numbers | None = None) -> LinearProbe:
        """Multinomial logistic regression on standardised features, all classes weighing the same.

        The classes of the voxels it learns from are balanced, those of a whole image are not: log(shares), times one
        number of `EXPONENTS`, is added to the scores. 1 is Bayes' rule, which rare classes hardly ever win with weak
        features, 0 leaves it out; the number is that of the highest Dice on these voxels, weighed as in whole images.

        Args:
            features, labels: of two classes or more.
            scale: of the features.
            shares: (K,) how much of all voxels each class is, above 0, in the order of the labels; the first one is
                background. None: nothing is added.
        """
        found = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=2000).fit(scale(features), labels)
        weight, bias = found.coef_, found.intercept_
        if len(weight) == 1:
            # of two classes scikit-learn gives the second's score, the first's being 0
            weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
        weight = weight / scale.spread
        probe = cls(np.asarray(found.classes_), weight, bias - weight @ scale.centre)
        if shares is None:
            return probe
        shifted = [cls(probe.classes, weight, probe.bias + power * np.log(shares)) for power in EXPONENTS]
        return max(shifted, key=lambda one: expected_dice(labels, one.predict(features), probe.classes, shares))

    def predict(self, features: Numbers) -> Labels:
        """(N,) the class with the largest score."""
        return np.asarray(self.classes[np.argmax(features @ self.weight.T + self.bias, axis=1)])


def matched_clusters(features: Numbers, labels: Labels, seed: int, weights: Numbers | None = None) -> Labels:
    """k-means with as many clusters as classes, every cluster called as one class: the matching that is right for most
    voxels (Hungarian algorithm). The labels take no part in finding the clusters.

    Args:
        features, labels: of N voxels.
        seed: of the ten starts of k-means.
        weights: (N,) of the voxels; None: all the same.

    Returns:
        (N,) the class that each voxel's cluster stands for.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    clusters = KMeans(len(classes), n_init=10, random_state=seed).fit_predict(features, sample_weight=weights)
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (clusters, codes.reshape(-1)), 1.0 if weights is None else weights)
    _, matched = linear_sum_assignment(table, maximize=True)
    return np.asarray(classes[matched[clusters]])


def distance_between_classes(
    points: Numbers, labels: Labels, random: np.random.Generator, weights: Numbers | None = None
) -> float:
    """Mean Euclidean distance between voxels of different classes.

    Args:
        points: (N, F) features, or any coordinates.
        labels: (N,).
        random: draws a partner for every voxel; pairs of one class do not count.
        weights: (N,) of the voxels, a pair weighs the product; None: all the same.

    Returns:
        In the unit of the points; NaN with one class.
    """
    partner = random.permutation(len(labels))
    different = labels != labels[partner]
    if not different.any():
        return float("nan")
    distances = np.linalg.norm(points - points[partner], axis=1)[different]
    return float(np.average(distances, weights=None if weights is None else (weights * weights[partner])[different]))


def class_means(features: Numbers, labels: Labels, classes: Labels) -> Numbers:
    """(K, F) mean of every class; NaN where a class has no voxel."""
    return np.stack([features[labels == one].mean(0) if np.any(labels == one) else np.full(features.shape[1], np.nan)
                     for one in classes])


def distance_of_means(means: Numbers) -> float:
    """Mean Euclidean distance between the class means (K, F), over all pairs; NaN with fewer than two."""
    return float(pdist(means).mean()) if len(means) > 1 else float("nan")


def spread_within_classes(features: Numbers, labels: Labels, classes: Labels, means: Numbers) -> float:
    """Root of the mean squared Euclidean distance of the voxels from the mean of their class, all classes that are
    there weighing the same. For Gaussian classes with variance s^2 in each of F channels it is s sqrt(F).

    Args:
        features, labels: of voxels of these classes.
        classes: (K,) ascending.
        means: (K, F).
    """
    squares = np.sum((features - means[np.searchsorted(classes, labels)]) ** 2, axis=1)
    return float(np.sqrt(mean_over_classes(squares, labels)))


def dice_per_class(truth: Labels, prediction: Labels, classes: Sequence[int], ignore: int | None = None) -> Numbers:
    """Dice of two label maps.

    Args:
        truth, prediction: of the same shape; labels below 0 are background, as nnU-Net trains with them.
        classes: to look at.
        ignore: label of the truth that marks voxels without a truth, which do not count.

    Returns:
        (K,) 0 to 1; NaN for a class in neither map.
    """
    if ignore is not None:
        known = truth != ignore
        truth, prediction = truth[known], prediction[known]
    scores = []
    for one in classes:
        size = np.count_nonzero(truth == one) + np.count_nonzero(prediction == one)
        both = np.count_nonzero((truth == one) & (prediction == one))
        scores.append(2 * both / size if size else np.nan)
    return np.array(scores, np.float64)


def expected_dice(truth: Labels, prediction: Labels, classes: Labels, shares: Numbers) -> float:
    """Mean Dice of all classes but the first in an image whose classes have these shares, from drawn voxels.

    Args:
        truth, prediction: (N,) of voxels of all classes.
        classes: (K,) ascending.
        shares: (K,) of all voxels.
    """
    rates = np.array([[np.mean(prediction[truth == one] == other) for other in classes] for one in classes])
    joint = rates * np.asarray(shares)[:, None] / np.sum(shares)
    return float(np.mean((2 * np.diag(joint) / (joint.sum(0) + joint.sum(1)))[1:]))


@dataclass(frozen=True)
class GroupGap(PatientSums):
    """Distance between the class means of two groups of cases (scanners), relative to a unit; a statistic of sums over
    patients, so that `statistics.bootstrap_interval` gives its interval.

    Attributes:
        sums: (patients, groups * K * F) of the class means of a patient's cases.
        counts: (patients, groups * K) how many cases that are.
        signs: not used.
        groups: number of groups.
        unit: distance by which the result is divided.
    """

    groups: int = 2
    unit: float = 1.0

    def of_weights(self, weights: Numbers) -> Numbers:
        """The statistic (resamples,), see `PatientSums.of_weights`."""
        parts = np.array_split(weights, max(1, -(-len(weights) // AT_ONCE)))
        return np.concatenate([super(GroupGap, self).of_weights(part) for part in parts])

    def _of_totals(self, sums: Numbers, counts: Numbers) -> Numbers:
        """Mean over the pairs of groups, and over the classes that both have, of the distance of the class means."""
        counts = counts.reshape(len(counts), self.groups, -1)
        sums = sums.reshape(*counts.shape, -1)
        means = np.full(sums.shape, np.nan)
        np.divide(sums, counts[..., None], out=means, where=counts[..., None] > 0.5)
        distances = np.stack([np.linalg.norm(means[:, one] - means[:, other], axis=-1)
                              for one, other in combinations(range(self.groups), 2)], axis=1)
        return _mean_of_known(_mean_of_known(distances)) / self.unit


def group_gap(means: Numbers, groups: Sequence[str], patients: Sequence[str], unit: float) -> GroupGap:
    """How far the features of one anatomy are apart in two groups of cases.

    Args:
        means: (cases, K, F) class means of every case; NaN where a case has no voxel of a class.
        groups: of each case, two different ones or more.
        patients: of each case.
        unit: distance by which the result is divided: that of the classes.
    """
    names, members = np.unique(np.asarray(groups, str), return_inverse=True)
    people, owners = np.unique(np.asarray(patients, str), return_inverse=True)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(means).all(-1))
    sums = np.zeros((len(people), len(names), *means.shape[1:]))
    counts = np.zeros((len(people), len(names), means.shape[1]))
    place = (owners.reshape(-1), members.reshape(-1))
    np.add.at(sums, place, np.where(known[..., None], means, 0))
    np.add.at(counts, place, known.astype(np.float64))
    return GroupGap(sums.reshape(len(people), -1), counts.reshape(len(people), -1), np.ones(1), len(names), unit)


def gap_by_chance(
    estimate: Callable[[Sequence[str]], float], groups: Sequence[str], patients: Sequence[str],
    random: np.random.Generator, draws: int = 200,
) -> float:
    """The mean of a gap if groups were dealt out at random: few cases are never equal, whatever the scanner does.

    Args:
        estimate: the gap for other groups of the cases.
        groups, patients: of each case. Patients are dealt their groups whole; where one is in several groups, cases
            are.
        random: deals.
        draws: how often.
    """
    own = dict(zip(patients, groups))
    units = list(patients) if all(own[one] == group for one, group in zip(patients, groups)) else [
        str(number) for number in range(len(groups))]
    dealt = dict(zip(units, groups))
    found = []
    for _ in range(draws):
        shuffled = dict(zip(dealt, random.permutation(list(dealt.values())).tolist()))
        found.append(estimate([shuffled[unit] for unit in units]))
    known = [one for one in found if np.isfinite(one)]
    return float(np.mean(known)) if known else float("nan")


def _mean_of_known(values: Numbers) -> Numbers:
    """Mean over the last axis without NaN; NaN where there is nothing else."""
    known = np.isfinite(values)
    counts = known.sum(-1)
    total = np.where(known, values, 0).sum(-1)
    return np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)
