"""The gate's verdict on an intervention, from its metrics."""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.results import AttributeMetrics, InterventionMetrics, TargetMetrics, Verdict
from nnunet_cfcl.errors import listed

#: Smallest number of held-out cases for a verdict.
FEWEST_CASES = 8
#: Smallest Dice on originals with which the segmenter can judge counterfactuals.
LEAST_DICE = 0.5
#: Mean change, in standard deviations, below which an intervention has no effect.
NOTHING = 1e-4


def verdict_on(metrics: InterventionMetrics, composition: float | None, settings: GateSettings) -> Verdict:
    """Decide whether an intervention may be used.

    Args:
        metrics: metrics of the intervention.
        composition: composition of the generator, see `GateReport`.
        settings: limits of the metrics.
    """
    if metrics.cases < FEWEST_CASES:
        return Verdict(False, (f"only {metrics.cases} held-out cases have known values of {metrics.name}, "
                               f"{FEWEST_CASES} are needed",))
    if metrics.not_finite:
        return Verdict(False, (f"{metrics.not_finite} of {metrics.images} counterfactuals are not finite",))
    reasons = [*_effectiveness(metrics, settings), *_kept(metrics, settings), *_composition(composition, settings),
               *_reversibility(metrics, settings), *_anatomy(metrics, settings), *_distance(metrics, settings)]
    ineffective = any(_too_little(one, settings) for one in metrics.effectiveness)
    return Verdict(not reasons, tuple(reasons), tuple(_remarks(metrics, settings)), ineffective)


def _effectiveness(metrics: InterventionMetrics, settings: GateSettings) -> Iterator[str]:
    for one in metrics.effectiveness:
        unseen = [value.value for value in one.values if not value.real]
        if unseen:
            yield (f"no held-out case has {one.attribute} {listed(unseen)}, so that counterfactuals cannot be compared "
                   "with real images")
        elif not _is_predictable(one, settings):
            yield f"{_why_unpredictable(one)}, so that effectiveness is unknown"
        elif _too_little(one, settings):
            yield (f"effectiveness of {one.attribute} {one.share:.2f} is below {settings.effectiveness:g} x "
                   f"{one.accuracy:.2f}")


def _is_predictable(one: AttributeMetrics, settings: GateSettings) -> bool:
    """Whether the predictor is accurate enough on real images to judge the attribute."""
    return one.predictability is not None and one.predictability >= settings.predictability


def _too_little(one: AttributeMetrics, settings: GateSettings) -> bool:
    """Whether too few counterfactuals are classified as they should be; False if the attribute is not predictable."""
    if one.share is None or one.accuracy is None or not _is_predictable(one, settings):
        return False
    return one.share < settings.effectiveness * one.accuracy


def _why_unpredictable(one: AttributeMetrics) -> str:
    if one.accuracy is None:
        return f"fewer than two values of {one.attribute} occur in the held-out cases"
    return (f"the predictor cannot classify {one.attribute} on real images (accuracy {one.accuracy:.2f}, chance "
            f"{one.chance:.2f})")


def _kept(metrics: InterventionMetrics, settings: GateSettings) -> Iterator[str]:
    for one in metrics.kept:
        if _too_little(one, settings):
            yield (f"{one.attribute} changes too: kept in {one.share:.2f}, below {settings.effectiveness:g} x "
                   f"{one.accuracy:.2f}")


def _composition(composition: float | None, settings: GateSettings) -> Iterator[str]:
    if composition is None:
        yield "composition is not finite: the generator fails where no attribute is changed"
    elif composition > settings.composition:
        yield (f"composition {composition:.3f} is above {settings.composition:g}: images change although no attribute "
               "does")


def _reversibility(metrics: InterventionMetrics, settings: GateSettings) -> Iterator[str]:
    if metrics.reversibility is None:
        yield "the images do not change"
    elif metrics.reversibility > settings.reversibility:
        yield (f"reversibility {metrics.reversibility:.2f} is above {settings.reversibility:g}: the inverse "
               "intervention does not restore the original")


def anatomy_metric(metrics: InterventionMetrics, settings: GateSettings) -> tuple[str, float | None, float]:
    """Name, value and lower limit of the anatomy metric: relative Dice with a usable segmenter, else structure."""
    if metrics.dice_ratio is not None and metrics.dice_originals is not None and metrics.dice_originals >= LEAST_DICE:
        return "anatomy (Dice on counterfactuals relative to originals)", metrics.dice_ratio, settings.anatomy
    return "anatomy (structure agreement)", metrics.structure, settings.structure


def _anatomy(metrics: InterventionMetrics, settings: GateSettings) -> Iterator[str]:
    name, found, least = anatomy_metric(metrics, settings)
    if found is None:
        yield "anatomy is unknown: the images have no edges to compare"
    elif found < least:
        yield f"{name} {found:.2f} is below {least:g}"


def _distance(metrics: InterventionMetrics, settings: GateSettings) -> Iterator[str]:
    before, after, real = metrics.distance_before, metrics.distance_after, metrics.distance_real
    if before is None or after is None:
        return
    # two samples of the same group differ as well: this much is not the generator's fault
    if after > settings.distance * before + (real or 0.0):
        yield (f"the intensities' distance to the target group {after:.3f} is above {settings.distance:g} x "
               f"{before:.3f} (originals) + {real or 0.0:.3f} (two real samples of the group)")


def _remarks(metrics: InterventionMetrics, settings: GateSettings) -> Iterator[str]:
    for one in metrics.kept:
        if not _is_predictable(one, settings):
            yield f"{_why_unpredictable(one)}; whether it is kept is unknown"
    unmet = [_values_text(target) for target in metrics.targets if target.distance_after is None]
    if unmet:
        yield f"no held-out case has {listed(unmet, 3)}; the distance of these intensities is unknown"
    if metrics.dice_originals is not None and metrics.dice_originals < LEAST_DICE:
        yield (f"the segmenter's Dice of {metrics.dice_originals:.2f} on originals is too low to judge the anatomy; "
               "structure agreement is used instead")


def _values_text(target: TargetMetrics) -> str:
    return " and ".join(f"{name} {value}" for name, value in target.values.items())
