"""From figures to a verdict in words."""

from dataclasses import replace

import pytest

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.results import (
    AttributeFigures,
    InterventionFigures,
    TargetFigures,
    ValueFigures,
)
from nnunet_cfcl.counterfactual.gate.verdict import verdict_on

VALUES = (ValueFigures("A", 0.9, 10, 0.95, 12), ValueFigures("B", 0.92, 10, 0.97, 8))
EFFECT = AttributeFigures("scanner", 0.91, 0.96, 0.5, VALUES)
KEPT = AttributeFigures("disease", 0.9, 0.9, 0.5)
TARGETS = (TargetFigures({"scanner": "A"}, 10, 12, 0.5, 0.1, 0.02),)
GOOD = InterventionFigures(
    "scanner", 20, 20, (EFFECT,), (KEPT,), 0.2, 0.8, 0.3, None, None, 0.5, 0.1, 0.02, 0.4, 0.5, TARGETS)
LABELS = replace(GOOD, structure=0.3, dice_originals=0.9, dice_counterfactuals=0.85)
SETTINGS = GateSettings()


def test_good_figures_pass_without_a_word_of_blame():
    for figures in (GOOD, LABELS):
        verdict = verdict_on(figures, 0.01, SETTINGS)
        assert verdict.passed and not verdict.reasons and not verdict.remarks and not verdict.ineffective
        assert verdict.words == "passed"


@pytest.mark.parametrize("figures, composition, said, ineffective", [
    (replace(GOOD, effectiveness=(replace(EFFECT, share=0.31),)), 0,
     "effectiveness of scanner 0.31 is below 0.8 x 0.96", True),
    (replace(GOOD, effectiveness=(replace(EFFECT, share=0.31, accuracy=0.6),)), 0,
     "the predictor cannot tell scanner on real images (accuracy 0.60, guessing 0.50)", False),
    (replace(GOOD, effectiveness=(replace(EFFECT, accuracy=None, values=(
        VALUES[0], ValueFigures("C", 0.5, 4, None, 0))),)), 0, "no held-out case has scanner C", False),
    (replace(GOOD, kept=(replace(KEPT, share=0.7),)), 0,
     "disease is changed as well: kept in 0.70, below 0.8 x 0.90", False),
    (GOOD, 0.06, "composition 0.060 is above 0.05", False),
    (GOOD, None, "gives values that are no numbers where no attribute is changed", False),
    (replace(GOOD, not_finite=3), 0, "3 of 20 counterfactuals have values that are no numbers", False),
    (replace(GOOD, reversibility=0.51), 0, "reversibility 0.51 is above 0.5", False),
    (replace(GOOD, reversibility=None), 0, "nothing is changed", False),
    (replace(GOOD, structure=0.59), 0, "anatomy (agreement of structure) 0.59 is below 0.6", False),
    (replace(GOOD, structure=None), 0, "no structure that could be compared", False),
    (replace(LABELS, dice_counterfactuals=0.8), 0,
     "anatomy (Dice on counterfactuals relative to originals) 0.89 is below 0.9", False),
    (replace(GOOD, distance_after=0.53), 0,
     "the intensities' distance to the target group 0.530 is above 1 x 0.500", False),
])
def test_every_figure_beyond_its_limit_is_the_one_reason(figures, composition, said, ineffective):
    verdict = verdict_on(figures, composition, SETTINGS)
    assert not verdict.passed and len(verdict.reasons) == 1 and verdict.ineffective is ineffective
    assert said in verdict.reasons[0] and verdict.words.startswith("not passed: ")


def test_all_reasons_are_named():
    bad = replace(GOOD, effectiveness=(replace(EFFECT, share=0.1),), reversibility=2.0, structure=0.1)
    verdict = verdict_on(bad, 1.0, SETTINGS)
    assert len(verdict.reasons) == 4 and verdict.words.count("; ") == 3


def test_too_few_cases_say_nothing_else():
    verdict = verdict_on(InterventionFigures("scanner", 14, 7), None, SETTINGS)
    assert verdict.words == "not passed: only 7 held-out cases whose values of scanner are known, 8 are needed"


def test_a_predictor_no_better_than_guessing_cannot_make_a_generator_pass_that_does_nothing():
    """With an accuracy of 0.55 a counterfactual that is its original is taken for its new value in 0.45."""
    nothing = replace(GOOD, effectiveness=(replace(EFFECT, share=0.45, accuracy=0.55),))
    assert SETTINGS.effectiveness * 0.55 < 0.45
    assert not verdict_on(nothing, 0, SETTINGS).passed


def test_an_attribute_that_nobody_can_tell_is_a_remark_where_it_was_not_to_change():
    dim = replace(GOOD, kept=(replace(KEPT, share=0.2, accuracy=0.55),))
    verdict = verdict_on(dim, 0, SETTINGS)
    assert verdict.passed and "whether it is kept is not known" in verdict.words


def test_a_combination_that_no_real_case_has_is_a_remark():
    target = TargetFigures({"scanner": "A", "disease": "no"}, 10, 0, None, None, None)
    unmet = replace(GOOD, targets=(target,), distance_before=None, distance_after=None, distance_real=None)
    verdict = verdict_on(unmet, 0, SETTINGS)
    assert verdict.passed and "no held-out case has scanner A and disease no" in verdict.words


def test_a_poor_segmenter_leaves_the_verdict_to_the_structure():
    poor = replace(LABELS, dice_originals=0.4, dice_counterfactuals=0.1, structure=0.8)
    verdict = verdict_on(poor, 0, SETTINGS)
    assert verdict.passed and "too little to judge by" in verdict.words
    assert not verdict_on(replace(poor, structure=0.5), 0, SETTINGS).passed


def test_what_two_real_groups_differ_by_is_no_fault():
    close = replace(GOOD, distance_before=0.02, distance_after=0.03, distance_real=0.015)
    assert verdict_on(close, 0, SETTINGS).passed
    assert not verdict_on(replace(close, distance_real=0.005), 0, SETTINGS).passed


def test_the_limits_are_those_of_the_settings():
    lenient = GateSettings(effectiveness=0.1, reversibility=3.0, structure=0.0, distance=5.0, composition=1.0)
    effect = (replace(EFFECT, share=0.2),)
    bad = replace(GOOD, effectiveness=effect, reversibility=2.0, structure=0.1, distance_after=2.0)
    assert verdict_on(bad, 0.5, lenient).passed
