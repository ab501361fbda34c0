"""Distance between the features of two groups of cases (scanners), and the distance expected by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.evaluation.statistics import Numbers, PatientSums

#: Resamples whose class means are in memory at the same time.
AT_ONCE = 250


@dataclass(frozen=True)
class GroupGap(PatientSums):
    """Distance between the class means of two groups of cases, relative to a unit.

    It is a statistic of sums over patients, so that `statistics.bootstrap_interval` gives its interval.

    Attributes:
        sums: (patients, groups * K * F) sum of the class means of a patient's cases.
        counts: (patients, groups * K) number of these cases.
        signs: not used.
        groups: number of groups.
        unit: distance by which the result is divided.
    """

    groups: int = 2
    unit: float = 1.0

    def of_weights(self, weights: Numbers) -> Numbers:
        """Compute the statistic (resamples,), see `PatientSums.of_weights`."""
        parts = np.array_split(weights, max(1, -(-len(weights) // AT_ONCE)))
        return np.concatenate([super(GroupGap, self).of_weights(part) for part in parts])

    def _of_totals(self, sums: Numbers, counts: Numbers) -> Numbers:
        """Average the distance of class means over pairs of groups and the classes that both groups have."""
        counts = counts.reshape(len(counts), self.groups, -1)
        sums = sums.reshape(*counts.shape, -1)
        means = np.full(sums.shape, np.nan)
        np.divide(sums, counts[..., None], out=means, where=counts[..., None] > 0.5)
        distances = np.stack([np.linalg.norm(means[:, one] - means[:, other], axis=-1)
                              for one, other in combinations(range(self.groups), 2)], axis=1)
        return _mean_of_known(_mean_of_known(distances)) / self.unit


def group_gap(means: Numbers, groups: Sequence[str], patients: Sequence[str], unit: float) -> GroupGap:
    """Distance between the features of the same anatomy in two groups of cases.

    Args:
        means: (cases, K, F) class means of every case; NaN where a case has no voxel of a class.
        groups: group of each case, two different groups or more.
        patients: patient of each case.
        unit: distance by which the result is divided: that between classes.
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
    """Mean gap under a random permutation of the groups; it is above 0, since a few cases are never identical.

    Args:
        estimate: gives the gap for permuted groups of the cases.
        groups: group of each case.
        patients: patient of each case. Groups are permuted between patients; where a patient has cases in several
            groups, between cases.
        random: generator of the permutations.
        draws: number of permutations.
    """
    own = dict(zip(patients, groups))
    units = list(patients) if all(own[one] == group for one, group in zip(patients, groups)) else [
        str(number) for number in range(len(groups))]
    permuted = dict(zip(units, groups))
    found = []
    for _ in range(draws):
        shuffled = dict(zip(permuted, random.permutation(list(permuted.values())).tolist()))
        found.append(estimate([shuffled[unit] for unit in units]))
    known = [one for one in found if np.isfinite(one)]
    return float(np.mean(known)) if known else float("nan")


def _mean_of_known(values: Numbers) -> Numbers:
    """Mean over the last axis without NaN; NaN where all values are NaN."""
    known = np.isfinite(values)
    counts = known.sum(-1)
    total = np.where(known, values, 0).sum(-1)
    return np.divide(total, counts, out=np.full(total.shape, np.nan), where=counts > 0)
