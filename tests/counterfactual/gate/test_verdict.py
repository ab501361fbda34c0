"""Verdicts on metrics within and beyond the limits."""

from dataclasses import replace

import pytest

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.results import (
    AttributeMetrics,
    InterventionMetrics,
    TargetMetrics,
    ValueMetrics,
)
from nnunet_cfcl.counterfactual.gate.verdict import verdict_on

VALUES = (ValueMetrics("A", 0.9, 10, 0.95, 12), ValueMetrics("B", 0.92, 10, 0.97, 8))
EFFECT = AttributeMetrics("scanner", 0.91, 0.96, 0.5, VALUES)
KEPT = AttributeMetrics("disease", 0.9, 0.9, 0.5)
TARGETS = (TargetMetrics({"scanner": "A"}, 10, 12, 0.5, 0.1, 0.02),)
GOOD = InterventionMetrics(
    "scanner", 20, 20, (EFFECT,), (KEPT,), 0.2, 0.8, 0.3, None, None, 0.5, 0.1, 0.02, 0.4, 0.5, TARGETS)
LABELS = replace(GOOD, structure=0.3, dice_originals=0.9, dice_counterfactuals=0.85)
SETTINGS = GateSettings()


def test_good_metrics_pass_without_reasons_or_remarks():
    for metrics in (GOOD, LABELS):
        verdict = verdict_on(metrics, 0.01, SETTINGS)
        assert verdict.passed and not verdict.reasons and not verdict.remarks and not verdict.ineffective
        assert verdict.summary == "passed"


@pytest.mark.parametrize("metrics, composition, reason, ineffective", [
    (replace(GOOD, effectiveness=(replace(EFFECT, share=0.31),)), 0,
     "effectiveness of scanner 0.31 is below 0.8 x 0.96", True),
    (replace(GOOD, effectiveness=(replace(EFFECT, share=0.31, accuracy=0.6),)), 0,
     "the predictor cannot classify scanner on real images (accuracy 0.60, chance 0.50), so that effectiveness is "
     "unknown", False),
    (replace(GOOD, effectiveness=(replace(EFFECT, accuracy=None, values=(
        VALUES[0], ValueMetrics("C", 0.5, 4, None, 0))),)), 0,
     "no held-out case has scanner C, so that counterfactuals cannot be compared with real images", False),
    (replace(GOOD, kept=(replace(KEPT, share=0.7),)), 0,
     "disease changes too: kept in 0.70, below 0.8 x 0.90", False),
    (GOOD, 0.06, "composition 0.060 is above 0.05", False),
    (GOOD, None, "composition is not finite: the generator fails where no attribute is changed", False),
    (replace(GOOD, not_finite=3), 0, "3 of 20 counterfactuals are not finite", False),
    (replace(GOOD, reversibility=0.51), 0,
     "reversibility 0.51 is above 0.5: the inverse intervention does not restore the original", False),
    (replace(GOOD, reversibility=None), 0, "the images do not change", False),
    (replace(GOOD, structure=0.59), 0, "anatomy (structure agreement) 0.59 is below 0.6", False),
    (replace(GOOD, structure=None), 0, "anatomy is unknown: the images have no edges to compare", False),
    (replace(LABELS, dice_counterfactuals=0.8), 0,
     "anatomy (Dice on counterfactuals relative to originals) 0.89 is below 0.9", False),
    (replace(GOOD, distance_after=0.53), 0,
     "the intensities' distance to the target group 0.530 is above 1 x 0.500 (originals) + 0.020 (two real "
     "samples of the group)", False),
])
def test_every_metric_beyond_its_limit_is_the_only_reason(metrics, composition, reason, ineffective):
    verdict = verdict_on(metrics, composition, SETTINGS)
    assert not verdict.passed and len(verdict.reasons) == 1 and verdict.ineffective is ineffective
    assert reason in verdict.reasons[0] and verdict.summary.startswith("not passed: ")


def test_all_reasons_are_named():
    bad = replace(GOOD, effectiveness=(replace(EFFECT, share=0.1),), reversibility=2.0, structure=0.1)
    verdict = verdict_on(bad, 1.0, SETTINGS)
    assert len(verdict.reasons) == 4 and verdict.summary.count("; ") == 3


def test_too_few_cases_are_the_only_reason():
    verdict = verdict_on(InterventionMetrics("scanner", 14, 7), None, SETTINGS)
    assert verdict.summary == "not passed: only 7 held-out cases have known values of scanner, 8 are needed"


def test_a_generator_without_effect_does_not_pass_with_a_predictor_at_chance_level():
    """With an accuracy of 0.55 an unchanged image is classified as its new value in 0.45 of the cases."""
    nothing = replace(GOOD, effectiveness=(replace(EFFECT, share=0.45, accuracy=0.55),))
    assert SETTINGS.effectiveness * 0.55 < 0.45
    assert not verdict_on(nothing, 0, SETTINGS).passed


def test_an_unpredictable_attribute_that_should_not_change_is_a_remark():
    dim = replace(GOOD, kept=(replace(KEPT, share=0.2, accuracy=0.55),))
    verdict = verdict_on(dim, 0, SETTINGS)
    assert verdict.passed and "whether it is kept is unknown" in verdict.summary


def test_a_combination_without_real_cases_is_a_remark():
    target = TargetMetrics({"scanner": "A", "disease": "no"}, 10, 0, None, None, None)
    unmet = replace(GOOD, targets=(target,), distance_before=None, distance_after=None, distance_real=None)
    verdict = verdict_on(unmet, 0, SETTINGS)
    assert verdict.passed and "no held-out case has scanner A and disease no" in verdict.summary


def test_with_a_poor_segmenter_structure_agreement_decides():
    poor = replace(LABELS, dice_originals=0.4, dice_counterfactuals=0.1, structure=0.8)
    verdict = verdict_on(poor, 0, SETTINGS)
    assert verdict.passed and "too low to judge the anatomy; structure agreement is used instead" in verdict.summary
    assert not verdict_on(replace(poor, structure=0.5), 0, SETTINGS).passed


def test_the_distance_between_two_real_samples_is_tolerated():
    close = replace(GOOD, distance_before=0.02, distance_after=0.03, distance_real=0.015)
    assert verdict_on(close, 0, SETTINGS).passed
    assert not verdict_on(replace(close, distance_real=0.005), 0, SETTINGS).passed


def test_the_limits_come_from_the_settings():
    lenient = GateSettings(effectiveness=0.1, reversibility=3.0, structure=0.0, distance=5.0, composition=1.0)
    effect = (replace(EFFECT, share=0.2),)
    bad = replace(GOOD, effectiveness=effect, reversibility=2.0, structure=0.1, distance_after=2.0)
    assert verdict_on(bad, 0.5, lenient).passed
