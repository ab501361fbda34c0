"""Groups of images that look as if they came from the same scanner: a proposal where nobody wrote the scanner down.

Every image is described by statistics of its intensities and of its noise, which tell scanners apart better than
anatomies; the descriptions are clustered. Groups are believed only if resampled cases give the same ones and if there
is a gap between any two of them.
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

#: Few, so that intensities, which depend on the anatomy too, do not outweigh the noise.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEATURES = (*(f"quantile {q:g}" for q in QUANTILES), "noise level", "noise correlation", "fine detail")
#: Gives noise of standard deviation 6 from white noise of 1, and nothing from a linear or quadratic surface.
LAPLACIAN_OF_LAPLACIAN = np.array([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
#: Padding and masked background: squares of so many voxels whose values differ by less than this share of their range.
FLAT_VOXELS, FLAT = 5, 1e-4
#: Numbers of groups that are tried.
MOST_GROUPS = 6
#: Agreement of resampled groups (adjusted Rand index, 1 is perfect, 0 chance) from which groups are believed.
STABLE = 0.8
#: Probability, up to which groups are believed, of so few cases between two of them if the two were one.
CHANCE = 0.05
#: Fewest cases for which groups are looked for, and in every group that is believed.
FEWEST_CASES, FEWEST_IN_GROUP = 20, 5
RESAMPLINGS = 20
#: Share of the mean variance that is added to every direction, so that few cases do not decide what parts two groups.
RIDGE = 0.1


def describe_acquisition(image: NDArray[np.floating]) -> NDArray[np.float64]:
    """Statistics of an image's intensities and noise, `FEATURES` for every channel.

    Flat places are left out: a masked background or a black border says where the patient is, not what took the image.
    The intensities are brought to the range of their 1st and 99th percentile before noise is looked at, so that a gain
    is no noise. Noise is what a Laplacian leaves in the smoothest half of the image: its robust standard deviation
    (Immerkær 1996, "Fast noise variance estimation", with the median), and how neighbours in it agree. Fine detail is
    the same of the whole image.

    Args:
        image: (C, Z, Y, X) intensities as nnU-Net leaves them; 2D images have Z 1.

    Returns:
        (C * len(FEATURES),): quantiles in the image's units, natural logarithms of noise level and fine detail, the
        correlation from -1 to 1.
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
    """Correlation of neighbours along the last axis, both of them in ``where``."""
    both = where[..., 1:] & where[..., :-1]
    left, right = residual[..., :-1][both], residual[..., 1:][both]
    power = float(np.sqrt(np.mean(left**2) * np.mean(right**2))) if len(left) else 0.0
    return float(np.mean(left * right)) / power if power > 0 else 0.0


@dataclass(frozen=True)
class Grouping:
    """The cases, cut into a number of groups.

    Attributes:
        groups: (N,) the group of every case.
        stability: agreement of resampled groups with these, mean adjusted Rand index; 1 is perfect, 0 chance.
        chance: probability of so few cases between the two groups that are least apart, if these were one.
    """

    groups: NDArray[np.intp]
    stability: float
    chance: float

    @property
    def believed(self) -> bool:
        """Whether the groups are stable, apart, and none of them tiny."""
        return bool(self.stability >= STABLE and self.chance <= CHANCE
                    and np.bincount(self.groups).min() >= FEWEST_IN_GROUP)


@dataclass(frozen=True)
class AcquisitionGroups:
    """What was found.

    Attributes:
        groups: (N,) number of every case's group, 0 being the largest; all 0 where no groups are believed.
        margin: (N,) from -1 to 1 how much nearer a case is to its own group than to the next (silhouette); around 0 it
            lies between them. All 0 for one group.
        tried: number of groups -> the cases cut into so many.
        plane: (N, 2) the descriptions' first two principal components, for a picture.
    """

    groups: NDArray[np.intp]
    margin: NDArray[np.float64]
    tried: dict[int, Grouping]
    plane: NDArray[np.float64]

    @property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.groups.max()) + 1


def find_acquisition_groups(
    descriptions: NDArray[np.float64], count: int | None = None, seed: int = 0
) -> AcquisitionGroups:
    """Cluster descriptions (k-means): into the largest number of groups that is believed, else they are one group.

    Stability of a number of groups is the mean adjusted Rand index between the groups of all cases and those that
    centres learned from half of them give (Lange et al. 2004, "Stability-based validation of clustering solutions"). A
    long single group is cut into stable parts too, so there must be a gap between any two groups: along the line that
    parts them best (Fisher 1936) fewer cases midway than about either centre. This is a plain form of the dip test
    (Hartigan & Hartigan 1985; on lines through groups: Kalogeratos & Likas 2012, "Dip-means"). The line is chosen by
    the same cases, which makes the probability a little too small.

    Args:
        descriptions: (N, F) of `describe_acquisition`.
        count: groups that there are, believed or not; None: as many as are believed, none with less than
            `FEWEST_CASES` cases.
        seed: of k-means and the resampling.
    """
    scaled = _standardised(descriptions)
    different = len(np.unique(scaled, axis=0))
    most = min(MOST_GROUPS, different, len(scaled) // FEWEST_IN_GROUP) if len(scaled) >= FEWEST_CASES else 1
    tried = {n: _cut(scaled, n, seed) for n in (range(2, most + 1) if count is None else [min(count, different)])}
    taken = [cut.groups for cut in tried.values() if cut.believed or count is not None]
    groups = _largest_first(taken[-1]) if taken else np.zeros(len(scaled), np.intp)
    margin = np.asarray(silhouette_samples(scaled, groups)) if groups.any() else np.zeros(len(scaled))
    return AcquisitionGroups(groups, margin, tried, _principal_plane(scaled))


def _standardised(descriptions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every statistic with median 0 and comparable spread; a single odd image does not decide about it."""
    centred = descriptions - np.median(descriptions, axis=0)
    low, high = np.quantile(centred, (0.1, 0.9), axis=0)
    spread = np.where(high - low > 1e-9, high - low, 1.0)
    return np.clip(centred / spread, -3, 3)


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
    """Probability of so few cases midway between two groups (n, F) if they were one.

    One group has along every line at least as many cases midway as at the sparser of two places around it.
    """
    centre, apart = one.mean(0), other.mean(0) - one.mean(0)
    within = np.cov(np.concatenate([one - centre, other - other.mean(0)]), rowvar=False)
    ridge = RIDGE * np.trace(within) / len(apart) + 1e-9
    line = np.linalg.solve(within + ridge * np.eye(len(apart)), apart)
    # the centres are at 0 and 1; the three windows are equally wide and do not overlap
    along = (np.concatenate([one, other]) - centre) @ line / (apart @ line)
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
