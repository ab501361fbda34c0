"""Schedules: the learning rate of both trainings, the ramps, and that they are what they were, to the last bit."""

import math

import numpy as np
import pytest

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.runs.schedule import cosine, learning_rate, ramp

DEFAULTS = PretrainSettings()


def rates(steps: int, peak: float = 1.0, final: float = 0.1, warmup_fraction: float = 0.25) -> list[float]:
    return [learning_rate(step, steps, peak, final, warmup_fraction) for step in range(steps)]


def test_the_rate_rises_linearly_then_falls_to_the_final_rate():
    found = rates(100)
    assert found[:25] == pytest.approx([(step + 1) / 25 for step in range(25)])
    assert all(a > b for a, b in zip(found[24:], found[25:], strict=False))
    assert found[-1] == pytest.approx(0.1)
    # half way through the cosine
    assert found[24 + 37] == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_short_runs_have_at_least_one_warm_up_step_and_positive_rates(total, fraction):
    found = rates(total, DEFAULTS.initial_lr, DEFAULTS.final_lr, fraction)
    assert all(0 < rate <= DEFAULTS.initial_lr for rate in found)
    assert max(found) == DEFAULTS.initial_lr


def test_a_ramp_is_linear_up_to_its_length_and_constant_from_there_on():
    assert [ramp(position, 4, 2.0) for position in range(7)] == [0, 0.5, 1, 1.5, 2, 2, 2]
    assert [ramp(position, 0) for position in (0, 1, 2)] == [0, 1, 1]


def test_a_cosine_goes_from_start_to_end():
    assert [cosine(position, 4, 3.0, 1.0) for position in (0, 2, 4)] == pytest.approx([3, 2, 1])


# ---------------------------------------------------------------- literal copies of the formulas of version 0.1


def pretraining_before(step: int, total_steps: int, initial_lr: float, final_lr: float, fraction: float) -> float:
    warmup = min(max(1, round(fraction * total_steps)), max(1, total_steps - 1))
    if step < warmup:
        return initial_lr * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, total_steps - warmup)
    span = initial_lr - final_lr
    return final_lr + span * 0.5 * (1 + math.cos(math.pi * progress))


def generator_before(number: int, total_steps: int, peak_lr: float, warmup_steps: int) -> float:
    warm = min(1.0, (number + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * number / total_steps))
    return peak_lr * warm * (0.02 + 0.98 * cosine)


def finetuning_before(rate: float, epoch: int, length: int) -> float:
    rate *= min(1.0, (epoch + 1) / (length + 1))
    return rate


def beta_before(number: int, total_steps: int, beta: float, fraction: float) -> float:
    rising = fraction * total_steps
    return beta * min(1.0, (number + 1) / max(1.0, rising))


def adversary_before(number: int, total_steps: int) -> float:
    return min(1.0, number / max(1.0, 0.05 * total_steps))


RANDOM = np.random.default_rng(0)
PEAKS = [1e-3, 3e-4, 0.01, *RANDOM.uniform(1e-5, 1, 5).tolist()]


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1313, 2500])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.37, 1.0])
def test_the_rates_of_the_pretraining_are_bit_equal_to_those_of_before(total, fraction):
    for peak in PEAKS:
        for final in (0.0, 1e-6, peak / 7):
            for step in range(total):
                assert (learning_rate(step, total, peak, final, fraction)
                        == pretraining_before(step, total, peak, final, fraction))


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1313, 2500])
@pytest.mark.parametrize("warmup", [0, 1, 3, 100, 1000, 5000])
def test_the_rates_of_the_generator_are_bit_equal_to_those_of_before(total, warmup):
    for peak in PEAKS:
        for step in range(total):
            now = peak * ramp(step + 1, warmup) * cosine(step, total, end=0.02)
            assert now == generator_before(step, total, peak, warmup)


@pytest.mark.parametrize("length", [0, 1, 7, 50, 333])
def test_the_warm_up_of_the_fine_tuning_is_bit_equal_to_that_of_before(length):
    for peak in PEAKS:
        for epoch in range(400):
            rate = peak * (1 - epoch / 400) ** 0.9
            assert rate * ramp(epoch + 1, length + 1) == finetuning_before(rate, epoch, length)


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1313, 2500])
def test_the_ramps_of_the_generator_are_bit_equal_to_those_of_before(total):
    for step in range(total):
        assert ramp(step, 0.05 * total) == adversary_before(step, total)
        for beta in PEAKS:
            for fraction in (0.0, 0.1, 0.333, 1.0):
                assert beta * ramp(step + 1, fraction * total) == beta_before(step, total, beta, fraction)
