"""Acquisition groups: clusters of images of similar acquisition, proposed where the scanner is not recorded.

Every image is described by statistics of its intensities and noise, which depend on the scanner more than on the
anatomy; the descriptions are clustered. Groups are accepted only if they are stable under resampling and if there is a
gap between any two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import binom
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_samples

#: Few levels, so that intensities, which also depend on the anatomy, do not outweigh the noise.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEATURES = (*(f"quantile {q:g}" for q in QUANTILES), "noise level", "noise correlation", "fine detail")
#: Response to white noise of standard deviation 1: noise of standard deviation 6; to a quadratic surface: 0.
LAPLACIAN_OF_LAPLACIAN = np.array([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
#: Side length, in voxels, and relative intensity range of squares that are padding or masked background.
FLAT_VOXELS, FLAT = 5, 1e-4
#: Largest number of groups that is tried.
MOST_GROUPS = 6
#: Smallest stability (adjusted Rand index of resampled groups; 1: identical, 0: chance) of accepted groups.
STABLE = 0.8
#: Largest p-value of the gap between accepted groups: probability of so few cases in between if there was one group.
CHANCE = 0.05
#: Smallest number of cases to group, and of cases in an accepted group.
FEWEST_CASES, FEWEST_IN_GROUP = 20, 5
RESAMPLINGS = 20
#: Ridge regularisation of the within-group covariance, relative to its mean variance, for groups of few cases.
RIDGE = 0.1


def describe_acquisition(image: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compute statistics of an image's intensities and noise, `FEATURES` for every channel.

    Flat regions are left out: masked background and black borders depend on the patient's position, not on the
    acquisition. Before the noise is measured, intensities are rescaled by their 1st and 99th percentile, so that a gain
    does not count as noise. The noise level is the robust standard deviation of the Laplacian residual in the smoothest
    half of the image (Immerkær 1996, "Fast noise variance estimation", with the median), the noise correlation that of
    neighbouring residuals. Fine detail is the standard deviation of the residual in the whole image.

    Args:
        image: (C, Z, Y, X) preprocessed intensities; Z = 1 in 2D.

    Returns:
        (C * len(FEATURES),): quantiles in the image's units, natural logarithms of noise level and fine detail, noise
        correlation in [-1, 1].
    """
    return np.concatenate([_describe_channel(np.asarray(channel, np.float64)) for channel in image])


def _describe_channel(channel: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.quantile(channel, (0.01, 0.99))
    planes = (channel - low) / max(float(high - low), 1e-12)
    residual = ndimage.convolve(planes, LAPLACIAN_OF_LAPLACIAN[None], mode="nearest") / 6
    slope = np.hypot(*(ndimage.gaussian_filter(planes, (0, 2, 2), order, mode="nearest")
                       for order in ((0, 1, 0), (0, 0, 1))))
    square = (1, FLAT_VOXELS, FLAT_VOXELS)
    seen = ndimage.maximum_filter(planes, square) - ndimage.minimum_filter(planes, square) > FLAT
    if not seen.any():
        seen[:] = True
    smooth = seen & (slope <= np.median(slope[seen]))
    noise = float(np.median(np.abs(residual[smooth]))) / 0.6745
    detail = float(np.sqrt(np.mean(residual[seen] ** 2)))
    return np.array([*np.quantile(channel[seen], QUANTILES), np.log(noise + 1e-4), _neighbours(residual, smooth),
                     np.log(detail + 1e-4)])


def _neighbours(residual: NDArray[np.float64], where: NDArray[np.bool_]) -> float:
    """Correlation of neighbours along the last axis, both within ``where``."""
    both = where[..., 1:] & where[..., :-1]
    left, right = residual[..., :-1][both], residual[..., 1:][both]
    power = float(np.sqrt(np.mean(left**2) * np.mean(right**2))) if len(left) else 0.0
    return float(np.mean(left * right)) / power if power > 0 else 0.0


@dataclass(frozen=True)
class Grouping:
    """A partition of the cases into a given number of groups.

    Attributes:
        groups: (N,) group of every case.
        stability: mean adjusted Rand index between these groups and resampled ones; 1: identical, 0: chance.
        chance: p-value of the gap between the two closest groups.
    """

    groups: NDArray[np.intp]
    stability: float
    chance: float

    @property
    def accepted(self) -> bool:
        """Whether the groups are stable, separated by gaps, and large enough."""
        return bool(self.stability >= STABLE and self.chance <= CHANCE
                    and np.bincount(self.groups).min() >= FEWEST_IN_GROUP)


@dataclass(frozen=True)
class AcquisitionGroups:
    """The acquisition groups of a dataset.

    Attributes:
        groups: (N,) group of every case, 0 being the largest; all 0 where no groups are accepted.
        margin: (N,) silhouette of every case in [-1, 1], around 0 between two groups; all 0 for one group.
        tried: number of groups -> partition of the cases.
        plane: (N, 2) first two principal components of the descriptions, for plotting.
    """

    groups: NDArray[np.intp]
    margin: NDArray[np.float64]
    tried: dict[int, Grouping]
    plane: NDArray[np.float64]

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1


def find_acquisition_groups(
    descriptions: NDArray[np.float64], count: int | None = None, seed: int = 0
) -> AcquisitionGroups:
    """Cluster descriptions (k-means) into the largest number of accepted groups, or one group if none is accepted.

    The stability of a number of groups is the mean adjusted Rand index between the groups of all cases and the groups
    assigned by cluster centres of half of the cases (Lange et al. 2004, "Stability-based validation of clustering
    solutions"). Since an elongated single group has stable parts too, any two groups must be separated by a gap: along
    the line that discriminates them best (Fisher 1936) there must be fewer cases midway than around either mean. This
    is a simple form of the dip test (Hartigan & Hartigan 1985; on lines through groups: Kalogeratos & Likas 2012,
    "Dip-means"). The line is fitted to the same cases, which makes the p-value slightly too small.

    Args:
        descriptions: (N, F), each from `describe_acquisition`.
        count: given number of groups, accepted or not; None: the largest accepted number, 1 for fewer than
            `FEWEST_CASES` cases.
        seed: seed of k-means and of the resampling.
    """
    scaled = _standardised(descriptions)
    different = len(np.unique(scaled, axis=0))
    most = min(MOST_GROUPS, different, len(scaled) // FEWEST_IN_GROUP) if len(scaled) >= FEWEST_CASES else 1
    tried = {n: _cut(scaled, n, seed) for n in (range(2, most + 1) if count is None else [min(count, different)])}
    taken = [cut.groups for cut in tried.values() if cut.accepted or count is not None]
    groups = _largest_first(taken[-1]) if taken else np.zeros(len(scaled), np.intp)
    margin = np.asarray(silhouette_samples(scaled, groups)) if groups.any() else np.zeros(len(scaled))
    return AcquisitionGroups(groups, margin, tried, _principal_plane(scaled))


def _standardised(descriptions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Robustly standardised statistics: median 0, divided by the distance of the outer deciles, clipped to +- 3."""
    centred = descriptions - np.median(descriptions, axis=0)
    low, high = np.quantile(centred, (0.1, 0.9), axis=0)
    scale = np.where(high - low > 1e-9, high - low, 1.0)
    return np.clip(centred / scale, -3, 3)


def _cut(scaled: NDArray[np.float64], count: int, seed: int) -> Grouping:
    groups = np.asarray(KMeans(count, n_init=10, random_state=seed).fit_predict(scaled), np.intp)
    chances = [_chance_of_gap(scaled[groups == one], scaled[groups == other])
               for one, other in combinations(range(count), 2)]
    return Grouping(groups, _stability(scaled, groups, count, seed), max(chances, default=1.0))


def _stability(scaled: NDArray[np.float64], groups: NDArray[np.intp], count: int, seed: int) -> float:
    random = np.random.default_rng([seed, count])
    scores = []
    for _ in range(RESAMPLINGS):
        half = random.permutation(len(scaled))[: max(count, len(scaled) // 2)]
        learned = KMeans(count, n_init=3, random_state=int(random.integers(2**31))).fit(scaled[half])
        scores.append(adjusted_rand_score(groups, learned.predict(scaled)))
    return float(np.mean(scores))


def _chance_of_gap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """P-value of the gap between two groups (n, F): probability of so few cases midway if there was one group.

    Along every line a single (unimodal) group has at least as many cases midway as at the sparser of two places around.
    """
    mean, apart = one.mean(0), other.mean(0) - one.mean(0)
    within = np.cov(np.concatenate([one - mean, other - other.mean(0)]), rowvar=False)
    ridge = RIDGE * np.trace(within) / len(apart) + 1e-9
    line = np.linalg.solve(within + ridge * np.eye(len(apart)), apart)
    # the means are at 0 and 1; the three windows are equally wide and do not overlap
    along = (np.concatenate([one, other]) - mean) @ line / (apart @ line)
    here, midway, there = (int(np.sum(np.abs(along - place) < 1 / 6)) for place in (0, 0.5, 1))
    return float(binom.cdf(midway, midway + min(here, there), 0.5))


def _largest_first(groups: NDArray[np.intp]) -> NDArray[np.intp]:
    order = np.argsort(-np.bincount(groups), kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return np.asarray(ranks[groups], np.intp)


def _principal_plane(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    left, sizes, _ = np.linalg.svd(scaled - scaled.mean(0), full_matrices=False)
    return np.asarray(left[:, :2] * sizes[:2])
