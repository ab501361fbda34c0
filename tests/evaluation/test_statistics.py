"""Coverage of intervals; the sign-flip test is exact for few patients and uniform without an effect."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, kstest, norm
from scipy.stats import t as student

from nnunet_cfcl.evaluation.statistics import (
    Draws,
    bootstrap_interval,
    draw_resamples,
    draw_sign_flips,
    is_exact,
    patient_sums,
    sign_flip_p_value,
)


def names(count):
    return [f"p{number}" for number in range(count)]


def test_values_are_summed_per_patient_without_missing_values():
    data = patient_sums(np.array([1.0, 3.0, np.nan, 8.0, np.nan]), ["a", "a", "b", "c", "a"])
    assert data.sums.tolist() == [[4.0], [8.0]]
    assert data.counts.tolist() == [[2.0], [1.0]]
    assert data.estimate == 4.0
    assert data.without_one.tolist() == [8.0, 2.0]


def test_the_difference_of_two_groups_is_the_difference_of_their_means_over_cases():
    values, groups = np.array([1.0, 3.0, 8.0]), [np.array([True, True, False]), np.array([False, False, True])]
    # patient a is in both groups
    data = patient_sums(values, ["a", "b", "a"], groups)
    assert data.estimate == 2.0 - 8.0
    assert math.isnan(data.without_one[0])


def test_resamples_have_the_original_number_of_patients():
    drawn = draw_resamples(7, 50, np.random.default_rng(0))
    assert drawn.shape == (50, 7)
    assert (drawn.sum(1) == 7).all()


@pytest.mark.parametrize(("patients", "cases"), [(12, 1), (40, 1), (25, 3)])
def test_a_95_percent_interval_covers_the_truth_in_93_to_97_percent_of_simulations(patients, cases):
    """With 3 correlated cases per patient, patients must be resampled, not cases."""
    random = np.random.default_rng(0)
    people, covered, simulations = np.repeat(names(patients), cases).tolist(), 0, 1000
    for _ in range(simulations):
        values = 0.3 + np.repeat(random.normal(size=patients), cases) + 0.2 * random.normal(size=patients * cases)
        low, high = bootstrap_interval(patient_sums(values, people), draw_resamples(patients, 1000, random))
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / simulations <= 0.97


def test_the_interval_of_skewed_values_covers_better_than_the_percentile_interval():
    random, covered = np.random.default_rng(2), np.zeros(2)
    for _ in range(1000):
        data, drawn = patient_sums(random.exponential(size=20), names(20)), draw_resamples(20, 1000, random)
        plain = np.quantile(data.of_weights(drawn), [0.025, 0.975])
        covered += [low <= 1 <= high for low, high in (bootstrap_interval(data, drawn), plain)]
    ours, plain = covered / 1000
    assert ours > plain
    assert 0.92 <= ours <= 0.97


def test_the_interval_is_equivariant_to_shift_and_scale():
    values, drawn = np.random.default_rng(0).normal(size=15), draw_resamples(15, 2000, np.random.default_rng(1))
    low, high = bootstrap_interval(patient_sums(values, names(15)), drawn)
    moved = bootstrap_interval(patient_sums(5 - 2 * values, names(15)), drawn)
    assert moved == pytest.approx((5 - 2 * high, 5 - 2 * low), abs=0.05)


def expected_interval(values, drawn, level):
    """BCa interval of a mean (Efron 1987) with the expanded quantiles of Hesterberg (2015), term by term."""
    count, estimate = len(values), values.mean()
    statistics = np.array([(row * values).sum() / count for row in drawn])
    ties = np.abs(statistics - estimate) < 1e-12
    below = ((statistics < estimate) & ~ties).mean() + ties.mean() / 2
    bias = norm.ppf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    jackknife = np.array([np.delete(values, left_out).mean() for left_out in range(count)])
    pulls = jackknife.mean() - jackknife
    acceleration = (pulls**3).sum() / (6 * (pulls**2).sum() ** 1.5)
    reach = math.sqrt(count / (count - 1)) * student.ppf((1 + level) / 2, count - 1)
    shares = [norm.cdf(bias + shift / (1 - acceleration * shift)) for shift in (bias - reach, bias + reach)]
    return tuple(np.quantile(statistics, shares))


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize(
    "values", [np.random.default_rng(3).exponential(size=10), np.array([0.0, 0.0, 0.0, 1.0, 1.0, 4.0, 9.0])],
    ids=["skewed", "ties"])
def test_an_interval_is_the_bias_corrected_and_accelerated_one(values, level):
    drawn = draw_resamples(len(values), 400, np.random.default_rng(4))
    found = bootstrap_interval(patient_sums(values, names(len(values))), drawn, level)
    assert found == pytest.approx(expected_interval(values, drawn, level), rel=1e-9)


def test_the_bias_is_bounded_if_all_resamples_lie_on_one_side_of_the_estimate():
    values, drawn = np.array([0.0, 0.1, 0.3, 5.0]), np.zeros((6, 4))
    drawn[:, 0], drawn[:, 1] = [4, 3, 2, 1, 0, 2], [0, 1, 2, 1, 4, 0]
    drawn[:, 2] = 4 - drawn.sum(1)
    found = bootstrap_interval(patient_sums(values, names(4)), drawn, 0.5)
    assert found == pytest.approx(expected_interval(values, drawn, 0.5), rel=1e-9)


def test_no_values_have_no_interval_and_no_effect():
    data = patient_sums(np.array([]), [])
    assert data.sums.shape == (0, 1)
    assert np.isnan(Draws(0).interval(data)).all() and Draws(0).p_value(data) == 1.0


@pytest.mark.parametrize(("patients", "groups"), [
    (["a"], []), (["a", "b"], [np.ones(2, bool)]), (["a", "b"], [np.ones(2, bool), np.ones(3, bool)])])
def test_other_lengths_and_numbers_of_groups_are_an_error(patients, groups):
    with pytest.raises(ValueError, match="expected 0 or 2 groups and a patient for each of 2 values"):
        patient_sums(np.array([1.0, 2.0]), patients, groups)


def test_the_interval_of_equal_values_has_no_width_and_that_of_one_patient_is_nan():
    drawn = draw_resamples(4, 100, np.random.default_rng(0))
    assert bootstrap_interval(patient_sums(np.full(4, 0.1), names(4)), drawn) == pytest.approx((0.1, 0.1))
    single = patient_sums(np.array([0.5]), ["a"])
    assert np.isnan(bootstrap_interval(single, np.ones((10, 1)))).all()


def test_the_sign_flip_test_is_exact_for_few_patients():
    values = np.array([0.3, -0.1, 0.4, 0.25, 0.05, -0.02, 0.6])
    totals = [abs(sum(sign * value for sign, value in zip(signs, values)))
              for signs in itertools.product((-1, 1), repeat=len(values))]
    expected = np.mean([total >= abs(values.sum()) - 1e-12 for total in totals])
    signs = draw_sign_flips(len(values), 3, np.random.default_rng(0))
    assert len({tuple(row) for row in signs}) == 2**7
    assert sign_flip_p_value(values, signs) == expected


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_p_value_does_not_depend_on_the_unit(scale):
    values, signs = np.random.default_rng(0).normal(0.2, 1, 14), draw_sign_flips(14, 0, np.random.default_rng(0))
    # each flip has its opposite; the observed sum, added up in another order, is one of them
    assert sign_flip_p_value(scale * values, signs) == sign_flip_p_value(values, signs)
    strongest = np.abs(values)
    assert sign_flip_p_value(scale * strongest, signs) == 2 / 2**14


def test_five_patients_who_all_improve_have_the_smallest_possible_p_value():
    signs = draw_sign_flips(5, 0, np.random.default_rng(0))
    assert sign_flip_p_value(np.full(5, 0.1), signs) == 2 / 32


def test_with_differences_of_one_size_the_test_equals_the_sign_test():
    values = np.array([1.0] * 9 + [-1.0] * 3)
    signs = draw_sign_flips(12, 0, np.random.default_rng(0))
    assert sign_flip_p_value(values, signs) == pytest.approx(binomtest(9, 12).pvalue)


@pytest.mark.parametrize("patients", [14, 30])
def test_p_values_are_uniform_without_an_effect(patients):
    random = np.random.default_rng(3)
    signs = draw_sign_flips(patients, 4000, random)
    p_values = [sign_flip_p_value(random.laplace(size=patients), signs) for _ in range(400)]
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.033)


def test_random_flips_never_give_a_p_value_of_0():
    signs = draw_sign_flips(40, 999, np.random.default_rng(0))
    assert not is_exact(40)
    assert sign_flip_p_value(np.ones(40), signs) == 1 / 1000


def test_draws_depend_on_the_seed_and_not_on_earlier_draws():
    random = np.random.default_rng(0)
    data, other = (patient_sums(random.normal(0.2, 1, count), names(count)) for count in (20, 9))
    fresh, used = Draws(1), Draws(1)
    used.interval(other), used.p_value(other)
    assert (fresh.interval(data), fresh.p_value(data)) == (used.interval(data), used.p_value(data))
    assert Draws(2).interval(data) != fresh.interval(data)


def test_patients_without_a_difference_do_not_change_the_p_value():
    values = np.array([0.3, 0.1, -0.2, 0.4])
    padded = np.concatenate([values, np.zeros(30)])
    assert Draws(0).p_value(patient_sums(padded, names(34))) == Draws(0).p_value(patient_sums(values, names(4)))
