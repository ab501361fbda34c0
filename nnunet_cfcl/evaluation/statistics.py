"""Bootstrap intervals and sign-flip tests over patients.

Cases of one patient are not independent: patients are resampled and flipped with all their cases. Statistics are means
over cases nevertheless, as in the tables. Randomness is drawn first and applied afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

LEVEL = 0.95
RESAMPLES = 5_000
#: Most patients for which all sign flips (2 ** 16) are enumerated, and number of random sign flips for more patients.
EXACT_PATIENTS, FLIPS = 16, 20_000

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PatientSums:
    """Values of cases summed per patient, for a mean or for the difference between the means of two groups.

    Attributes:
        sums: (patients, K) sum of the values of a patient's cases in each of K groups.
        counts: (patients, K) number of these values.
        signs: (K,) weights of the group means in the statistic: (1,) for a mean, (1, -1) for a difference.
    """

    sums: Numbers
    counts: Numbers
    signs: Numbers

    def of_weights(self, weights: Numbers) -> Numbers:
        """Compute the statistic (resamples,) with each patient repeated ``weights`` (resamples, patients) times.

        It is NaN where a group is empty.
        """
        return self._of_totals(weights @ self.sums, weights @ self.counts)

    @property
    def estimate(self) -> float:
        """Statistic of the original sample."""
        return float(self.of_weights(np.ones((1, len(self.sums))))[0])

    @property
    def without_one(self) -> Numbers:
        """Jackknife: the statistic (patients,) without each patient in turn; NaN where a group becomes empty."""
        return self._of_totals(self.sums.sum(0) - self.sums, self.counts.sum(0) - self.counts)

    def _of_totals(self, sums: Numbers, counts: Numbers) -> Numbers:
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
        return np.asarray(means @ self.signs)


def patient_sums(values: Numbers, patients: Sequence[str], groups: Sequence[NDArray[np.bool_]] = ()) -> PatientSums:
    """Sum values per patient; NaN values are ignored, patients without a value are left out.

    Args:
        values: (cases,), NaN where a case has no value.
        patients: patient of each case.
        groups: empty for the mean of all cases; two masks (cases,) for the mean of the first minus that of the second.

    Raises:
        ValueError: the number of groups is neither 0 nor 2, or lengths differ.
    """
    if len(groups) not in (0, 2) or {len(patients), *map(len, groups)} != {len(values)}:
        raise ValueError(f"expected 0 or 2 groups and a patient for each of {len(values)} values, found {len(groups)} "
                         f"groups and {len(patients)} patients")
    members = [mask & np.isfinite(values) for mask in (groups or [np.ones(len(values), bool)])]
    codes = np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1].reshape(-1)
    count = int(codes.max(initial=-1)) + 1
    sums, counts = (np.stack([np.bincount(codes[mask], weights[mask], count) for mask in members], axis=1,
                             dtype=np.float64) for weights in (values, np.ones(len(values))))
    known = counts.any(axis=1)
    return PatientSums(sums[known], counts[known], np.array([1.0, -1.0][: len(members)]))


def draw_resamples(patients: int, resamples: int, generator: np.random.Generator) -> Numbers:
    """Draw bootstrap resamples as counts (resamples, patients) of each patient; rows sum to ``patients``."""
    return generator.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(np.float64)


def bootstrap_interval(data: PatientSums, resamples: Numbers, level: float = LEVEL) -> tuple[float, float]:
    """Compute the bias-corrected and accelerated (BCa) bootstrap interval of a mean or a difference of means.

    BCa follows Efron (1987). With few patients it is too narrow, since it divides by n and uses normal quantiles: as in
    the expanded percentile interval of Hesterberg (2015), the quantiles are those of Student's t, times
    sqrt(n / (n - 1)).

    Args:
        data: sums of n patients.
        resamples: (resamples, n) counts from `draw_resamples`.
        level: confidence level, between 0 and 1.

    Returns:
        Lower and upper end in the unit of the values; NaN, NaN with fewer than two patients.
    """
    count = len(data.sums)
    statistics = data.of_weights(resamples) if count > 1 else np.empty(0)
    statistics = statistics[np.isfinite(statistics)]
    if not len(statistics):
        return math.nan, math.nan
    estimate = data.estimate
    # ties may differ in the last digits through rounding
    close = np.isclose(statistics, estimate, rtol=1e-12, atol=1e-15)
    below = np.mean((statistics < estimate) & ~close) + np.mean(close) / 2
    bias = float(norm.ppf(np.clip(below, 1 / len(statistics), 1 - 1 / len(statistics))))
    reach = math.sqrt(count / (count - 1)) * float(t.ppf(0.5 + level / 2, count - 1))
    acceleration = _acceleration(data.without_one)
    ends = []
    for shift in (bias - reach, bias + reach):
        # an extreme outlier can make it negative, where the interval has no end
        scale = max(1 - acceleration * shift, 1e-6)
        ends.append(float(np.quantile(statistics, norm.cdf(bias + shift / scale))))
    return ends[0], ends[1]


def _acceleration(without_one: Numbers) -> float:
    known = without_one[np.isfinite(without_one)]
    pulls = known.mean() - known if len(known) else known
    squares = float(np.sum(pulls**2))
    return float(np.sum(pulls**3)) / (6 * squares**1.5) if squares > 1e-24 else 0.0


def is_exact(patients: int) -> bool:
    """Whether `draw_sign_flips` enumerates all flips of this number of patients."""
    return patients <= EXACT_PATIENTS


def draw_sign_flips(patients: int, flips: int, generator: np.random.Generator) -> NDArray[np.int8]:
    """Draw signs -1 and 1 (flips, patients): all 2 ** patients rows if `is_exact`, else ``flips`` random rows."""
    if is_exact(patients):
        rows = (np.arange(2**patients)[:, None] >> np.arange(patients)) & 1
    else:
        rows = generator.integers(0, 2, size=(flips, patients))
    return (1 - 2 * rows).astype(np.int8)


def sign_flip_p_value(sums: Numbers, signs: NDArray[np.int8]) -> float:
    """Compute the two-sided p value of a paired permutation test, which swaps two methods patient by patient.

    Args:
        sums: (patients,) sum of the paired differences of a patient's cases.
        signs: (flips, patients) from `draw_sign_flips`.

    Returns:
        Share of the flips whose absolute mean difference is at least the observed one. The observed order is counted
        among random flips, so that the p value is never 0 (Phipson and Smyth 2010). 1 without patients.
    """
    if not len(sums):
        return 1.0
    observed = abs(float(sums.sum()))
    far = int(np.sum(np.abs(signs @ sums) >= observed - 1e-12 * float(np.abs(sums).sum())))
    return far / len(signs) if is_exact(len(sums)) else (far + 1) / (len(signs) + 1)


class Draws:
    """Resamples and sign flips by seed and number of patients, independent of the order of the calls.

    Args:
        seed: seed of all draws, 0 or more.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # a few numbers of patients recur: all patients, those of the groups
        self._resamples = lru_cache(maxsize=4)(self._draw_resamples)
        self._flips = lru_cache(maxsize=4)(self._draw_flips)

    def interval(self, data: PatientSums) -> tuple[float, float]:
        """Compute `bootstrap_interval` with `RESAMPLES` resamples."""
        return bootstrap_interval(data, self._resamples(len(data.sums))) if len(data.sums) else (math.nan, math.nan)

    def p_value(self, data: PatientSums) -> float:
        """Compute `sign_flip_p_value` for the paired differences of one group (K = 1)."""
        # flips do not change patients without a difference
        sums = data.sums[data.sums[:, 0] != 0, 0]
        return sign_flip_p_value(sums, self._flips(len(sums)))

    def _draw_resamples(self, patients: int) -> Numbers:
        return draw_resamples(patients, RESAMPLES, np.random.default_rng([self.seed, 0, patients]))

    def _draw_flips(self, patients: int) -> NDArray[np.int8]:
        return draw_sign_flips(patients, FLIPS, np.random.default_rng([self.seed, 1, patients]))
