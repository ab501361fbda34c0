"""Learning rate: warm-up, cosine, and the shortest of runs."""

import pytest

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.runs.schedule import learning_rate


def test_the_rate_rises_linearly_then_falls_to_the_final_rate():
    settings = PretrainSettings(initial_lr=1.0, final_lr=0.1, warmup_fraction=0.25)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:25] == pytest.approx([(step + 1) / 25 for step in range(25)])
    assert all(a > b for a, b in zip(rates[24:], rates[25:], strict=False))
    assert rates[-1] == pytest.approx(0.1)
    # half way through the cosine
    assert learning_rate(24 + 37, 99 + 1, settings) == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_short_runs_have_at_least_one_warm_up_step_and_positive_rates(total, fraction):
    settings = PretrainSettings(warmup_fraction=fraction)
    rates = [learning_rate(step, total, settings) for step in range(total)]
    assert all(0 < rate <= settings.initial_lr for rate in rates)
    assert max(rates) == settings.initial_lr
