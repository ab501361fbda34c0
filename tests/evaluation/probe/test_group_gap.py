"""Gap between groups: known shifts, a slow oracle, permutations."""

import itertools

import numpy as np
import pytest

from nnunet_cfcl.evaluation.probe.group_gap import gap_by_chance, group_gap
from nnunet_cfcl.evaluation.statistics import Draws


def shifted_cases(shift, cases=12, classes=3, seed=0):
    """Class means of cases of two scanners, those of the second shifted along an axis, with a std of 0.1 over cases."""
    random = np.random.default_rng(seed)
    means = 0.1 * random.normal(size=(cases, classes, 4))
    groups = ["a" if case < cases // 2 else "b" for case in range(cases)]
    means[cases // 2:, :, 0] += shift
    return means, groups, [f"p{case}" for case in range(cases)]


def test_the_gap_is_the_shift_over_the_unit_and_its_interval_covers_it():
    means, groups, patients = shifted_cases(3.0)
    gap = group_gap(means, groups, patients, unit=2.0)
    assert gap.estimate == pytest.approx(1.5, abs=0.05)
    low, high = Draws(0).interval(gap)
    assert low < 1.5 < high and high - low < 0.2
    assert gap.estimate == pytest.approx(group_gap(means, groups[::-1], patients, 2.0).estimate)


def test_the_gap_equals_a_slow_loop_with_three_groups_and_missing_classes():
    random = np.random.default_rng(0)
    means = random.normal(size=(9, 2, 3))
    means[[0, 5], 1] = np.nan
    groups, patients = list("aabbbcccc"), list("112344567")
    slow = []
    for one, other in itertools.combinations("abc", 2):
        class_means = [[np.mean([m[k] for m, g in zip(means, groups) if g == name and np.isfinite(m[k]).all()], axis=0)
                    for k in range(2)] for name in (one, other)]
        slow.append(np.mean([np.linalg.norm(a - b) for a, b in zip(*class_means)]))
    gap = group_gap(means, groups, patients, 1.0)
    assert gap.estimate == pytest.approx(np.mean(slow))
    kept = [row for row, patient in enumerate(patients) if patient != "4"]
    again = group_gap(means[kept], [groups[row] for row in kept], [patients[row] for row in kept], 1.0)
    assert gap.without_one[3] == pytest.approx(again.estimate)


@pytest.mark.parametrize(("shift", "is_more"), [(0.0, False), (3.0, True)])
def test_the_gap_exceeds_chance_only_with_an_effect(shift, is_more):
    means, groups, patients = shifted_cases(shift, cases=20)
    chance = gap_by_chance(lambda permuted: group_gap(means, permuted, patients, 1.0).estimate, groups, patients,
                           np.random.default_rng(0))
    estimate = group_gap(means, groups, patients, 1.0).estimate
    assert chance > 0 and (estimate > 2 * chance) == is_more


def test_groups_are_permuted_between_whole_patients():
    seen = []
    groups, patients = list("aabbcc"), list("112233")
    gap_by_chance(lambda permuted: seen.append(list(permuted)) or 0.0, groups, patients, np.random.default_rng(0), 30)
    assert all(order[0] == order[1] and order[2] == order[3] and sorted(order) == groups for order in seen)
    assert len({tuple(order) for order in seen}) > 3
