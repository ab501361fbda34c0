"""Metrics of frozen features: clusters against classes, distances between and within classes.

Features are (N, F), labels (N,) integers. All functions are deterministic given their arguments: randomness comes from
a seed or a generator passed in, so that the same voxels of two networks are treated alike.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans

from nnunet_cfcl.evaluation.probe.linear_probe import Labels
from nnunet_cfcl.evaluation.statistics import Numbers


def mean_over_classes(values: Numbers, labels: Labels) -> float:
    """Mean of the class-wise means of values (N,), over the classes that occur; NaN without values."""
    means = [float(values[labels == label].mean()) for label in np.unique(labels)]
    return float(np.mean(means)) if means else float("nan")


def matched_clusters(features: Numbers, labels: Labels, seed: int, weights: Numbers | None = None) -> Labels:
    """Assign each voxel the class of its k-means cluster.

    There are as many clusters as classes. Clusters are found without labels and matched to classes afterwards such that
    most voxels are correct (Hungarian algorithm).

    Args:
        features: (N, F).
        labels: (N,).
        seed: seed of the ten starts of k-means.
        weights: (N,) weights of the voxels; None: uniform.

    Returns:
        (N,) classes.
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
    """Mean Euclidean distance between voxels of different classes, estimated from one random partner per voxel.

    Args:
        points: (N, F) features, or any coordinates.
        labels: (N,).
        random: generator of the partners; pairs within a class are left out.
        weights: (N,) weights of the voxels, multiplied for a pair; None: uniform.

    Returns:
        Distance in the unit of the points; NaN with one class.
    """
    partner = random.permutation(len(labels))
    different = labels != labels[partner]
    if not different.any():
        return float("nan")
    distances = np.linalg.norm(points - points[partner], axis=1)[different]
    return float(np.average(distances, weights=None if weights is None else (weights * weights[partner])[different]))


def class_means(features: Numbers, labels: Labels, classes: Labels) -> Numbers:
    """Mean feature (K, F) of every class; NaN for a class without voxels."""
    return np.stack([features[labels == one].mean(0) if np.any(labels == one) else np.full(features.shape[1], np.nan)
                     for one in classes])


def distance_of_means(means: Numbers) -> float:
    """Mean Euclidean distance over all pairs of class means (K, F); NaN with fewer than two classes."""
    return float(pdist(means).mean()) if len(means) > 1 else float("nan")


def std_within_classes(features: Numbers, labels: Labels, classes: Labels, means: Numbers) -> float:
    """Root mean square Euclidean distance of voxels from their class mean, balanced over the classes that occur.

    For Gaussian classes with variance s^2 in each of F channels it is s sqrt(F).

    Args:
        features: (N, F).
        labels: (N,), all of ``classes``.
        classes: (K,) ascending.
        means: (K, F) class means.
    """
    squares = np.sum((features - means[np.searchsorted(classes, labels)]) ** 2, axis=1)
    return float(np.sqrt(mean_over_classes(squares, labels)))
