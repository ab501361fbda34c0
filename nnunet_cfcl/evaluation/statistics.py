"""Bootstrap intervals and sign-flip tests over patients.

Cases of one patient are not independent: patients are resampled and flipped whole, with all their cases. Figures are
means over cases all the same, so that they are those of the tables. What is random is drawn first, and applied
afterwards.
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
#: Up to so many patients all sign flips are gone through (2 ** 16 of them), above it so many are drawn.
EXACT_PATIENTS, FLIPS = 16, 20_000

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PatientSums:
    """Values of cases added up per patient, for one mean or for the difference between the means of two groups.

    Attributes:
        sums: (patients, K) sum of the values of a patient's cases in each of K groups.
        counts: (patients, K) how many values that are.
        signs: (K,) of the groups' means in the statistic: (1,) for a mean, (1, -1) for a difference.
    """

    sums: Numbers
    counts: Numbers
    signs: Numbers

    def of_weights(self, weights: Numbers) -> Numbers:
        """The statistic (resamples,) where each patient is there ``weights`` (resamples, patients) times; NaN where a
        group has nobody."""
        return self._of_totals(weights @ self.sums, weights @ self.counts)

    @property
    def estimate(self) -> float:
        """The statistic of the patients as they are."""
        return float(self.of_weights(np.ones((1, len(self.sums))))[0])

    @property
    def without_one(self) -> Numbers:
        """(patients,) the statistic without each patient in turn; NaN where nobody is left in a group."""
        return self._of_totals(self.sums.sum(0) - self.sums, self.counts.sum(0) - self.counts)

    def _of_totals(self, sums: Numbers, counts: Numbers) -> Numbers:
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
        return np.asarray(means @ self.signs)


def patient_sums(values: Numbers, patients: Sequence[str], groups: Sequence[NDArray[np.bool_]] = ()) -> PatientSums:
    """Add values up per patient; values that are NaN do not count, patients without a value are left out.

    Args:
        values: (cases,), NaN where there is none.
        patients: of each case.
        groups: none for the mean of all cases; two masks (cases,) for the mean of the first minus that of the second.

    Raises:
        ValueError: another number of groups, or other lengths.
    """
    if len(groups) not in (0, 2) or {len(patients), *map(len, groups)} != {len(values)}:
        raise ValueError("expected no groups or two, and a patient for each value")
    members = [mask & np.isfinite(values) for mask in (groups or [np.ones(len(values), bool)])]
    codes = np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1].reshape(-1)
    count = int(codes.max(initial=-1)) + 1
    sums, counts = (np.stack([np.bincount(codes[mask], weights[mask], count) for mask in members], axis=1,
                             dtype=np.float64) for weights in (values, np.ones(len(values))))
    known = counts.any(axis=1)
    return PatientSums(sums[known], counts[known], np.array([1.0, -1.0][: len(members)]))


def draw_resamples(patients: int, resamples: int, generator: np.random.Generator) -> Numbers:
    """How often each patient is in each resample of as many patients: (resamples, patients), rows add up to
    ``patients``."""
    return generator.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(np.float64)


def bootstrap_interval(data: PatientSums, resamples: Numbers, level: float = LEVEL) -> tuple[float, float]:
    """Bias-corrected and accelerated (BCa) bootstrap interval of a mean or a difference of means.

    BCa is Efron's (1987). The bootstrap is too sure of itself with few patients, since it divides by n and has normal
    quantiles: as in Hesterberg's (2015) expanded percentile interval, quantiles are those of Student's t, times
    sqrt(n / (n - 1)).

    Args:
        data: of n patients.
        resamples: (resamples, n), of `draw_resamples`.
        level: of confidence, between 0 and 1.

    Returns:
        Lower and upper end, in the unit of the values; NaN, NaN with fewer than two patients.
    """
    count = len(data.sums)
    statistics = data.of_weights(resamples) if count > 1 else np.empty(0)
    statistics = statistics[np.isfinite(statistics)]
    if not len(statistics):
        return math.nan, math.nan
    estimate = data.estimate
    # rounding makes ties differ in the last digits
    close = np.isclose(statistics, estimate, rtol=1e-12, atol=1e-15)
    below = np.mean((statistics < estimate) & ~close) + np.mean(close) / 2
    bias = float(norm.ppf(np.clip(below, 1 / len(statistics), 1 - 1 / len(statistics))))
    reach = math.sqrt(count / (count - 1)) * float(t.ppf(0.5 + level / 2, count - 1))
    acceleration = _acceleration(data.without_one)
    ends = []
    for shift in (bias - reach, bias + reach):
        # a patient who is far from all others can make it negative, where the interval has no end
        scale = max(1 - acceleration * shift, 1e-6)
        ends.append(float(np.quantile(statistics, norm.cdf(bias + shift / scale))))
    return ends[0], ends[1]


def _acceleration(without_one: Numbers) -> float:
    known = without_one[np.isfinite(without_one)]
    pulls = known.mean() - known if len(known) else known
    squares = float(np.sum(pulls**2))
    return float(np.sum(pulls**3)) / (6 * squares**1.5) if squares > 1e-24 else 0.0


def is_exact(patients: int) -> bool:
    """Whether `draw_sign_flips` gives all flips of so many patients."""
    return patients <= EXACT_PATIENTS


def draw_sign_flips(patients: int, flips: int, generator: np.random.Generator) -> NDArray[np.int8]:
    """Signs (flips, patients) of -1 and 1: all 2 ** patients where `is_exact`, else ``flips`` random rows."""
    if is_exact(patients):
        rows = (np.arange(2**patients)[:, None] >> np.arange(patients)) & 1
    else:
        rows = generator.integers(0, 2, size=(flips, patients))
    return (1 - 2 * rows).astype(np.int8)


def sign_flip_p_value(sums: Numbers, signs: NDArray[np.int8]) -> float:
    """Two-sided p value of a paired permutation test: which of two methods is which is swapped patient by patient.

    Args:
        sums: (patients,) sum of the paired differences of a patient's cases.
        signs: (flips, patients) of `draw_sign_flips`.

    Returns:
        Share of the flips whose mean difference is at least as far from 0; where the flips are random the observed one
        is counted with them, so that it is never 0 (Phipson and Smyth 2010). 1 without patients.
    """
    if not len(sums):
        return 1.0
    observed = abs(float(sums.sum()))
    far = int(np.sum(np.abs(signs @ sums) >= observed - 1e-12 * float(np.abs(sums).sum())))
    return far / len(signs) if is_exact(len(sums)) else (far + 1) / (len(signs) + 1)


class Draws:
    """What is drawn for a number of patients, the same whatever was drawn before.

    Args:
        seed: 0 or more.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # some sizes come again and again: all cases, those of the groups
        self._resamples = lru_cache(maxsize=4)(self._draw_resamples)
        self._flips = lru_cache(maxsize=4)(self._draw_flips)

    def interval(self, data: PatientSums) -> tuple[float, float]:
        """`bootstrap_interval` with `RESAMPLES` resamples."""
        return bootstrap_interval(data, self._resamples(len(data.sums))) if len(data.sums) else (math.nan, math.nan)

    def p_value(self, data: PatientSums) -> float:
        """`sign_flip_p_value` of the differences of one group (K = 1)."""
        # patients without a difference stay as they are however they are flipped
        sums = data.sums[data.sums[:, 0] != 0, 0]
        return sign_flip_p_value(sums, self._flips(len(sums)))

    def _draw_resamples(self, patients: int) -> Numbers:
        return draw_resamples(patients, RESAMPLES, np.random.default_rng([self.seed, 0, patients]))

    def _draw_flips(self, patients: int) -> NDArray[np.int8]:
        return draw_sign_flips(patients, FLIPS, np.random.default_rng([self.seed, 1, patients]))
