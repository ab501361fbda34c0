"""From the gate's figures to a verdict in words."""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.results import AttributeFigures, InterventionFigures, TargetFigures, Verdict
from nnunet_cfcl.errors import listed

#: Fewer held-out cases say nothing.
FEWEST_CASES = 8
#: A segmenter that is worse on the originals cannot judge counterfactuals.
LEAST_DICE = 0.5
#: Mean change, in standard deviations, below which nothing happens.
NOTHING = 1e-4


def verdict_on(figures: InterventionFigures, composition: float | None, settings: GateSettings) -> Verdict:
    """Whether the intervention may be used, and why not.

    Args:
        figures: of the intervention.
        composition: of the generator, see `GateReport`.
        settings: the limits.
    """
    if figures.cases < FEWEST_CASES:
        return Verdict(False, (f"only {figures.cases} held-out cases whose values of {figures.name} are known, "
                               f"{FEWEST_CASES} are needed",))
    if figures.not_finite:
        return Verdict(False, (f"{figures.not_finite} of {figures.images} counterfactuals have values that are no "
                               "numbers",))
    reasons = [*_effectiveness(figures, settings), *_kept(figures, settings), *_composition(composition, settings),
               *_reversibility(figures, settings), *_anatomy(figures, settings), *_distance(figures, settings)]
    ineffective = any(_too_little(one, settings) for one in figures.effectiveness)
    return Verdict(not reasons, tuple(reasons), tuple(_remarks(figures, settings)), ineffective)


def _effectiveness(figures: InterventionFigures, settings: GateSettings) -> Iterator[str]:
    for one in figures.effectiveness:
        unseen = [value.value for value in one.values if not value.real]
        if unseen:
            yield (f"no held-out case has {one.attribute} {listed(unseen)}, so that nothing says whether "
                   "counterfactuals look like it")
        elif not _can_tell(one, settings):
            yield (f"{_cannot_tell(one)}, so that nothing says whether it was changed")
        elif _too_little(one, settings):
            yield (f"effectiveness of {one.attribute} {one.share:.2f} is below {settings.effectiveness:g} x "
                   f"{one.accuracy:.2f}")


def _can_tell(one: AttributeFigures, settings: GateSettings) -> bool:
    return one.predictability is not None and one.predictability >= settings.predictability


def _too_little(one: AttributeFigures, settings: GateSettings) -> bool:
    """Whether fewer counterfactuals than asked for are taken for what they should be; False where nobody can tell."""
    if one.share is None or one.accuracy is None or not _can_tell(one, settings):
        return False
    return one.share < settings.effectiveness * one.accuracy


def _cannot_tell(one: AttributeFigures) -> str:
    if one.accuracy is None:
        return f"held-out cases with two values of {one.attribute} are missing"
    return (f"the predictor cannot tell {one.attribute} on real images (accuracy {one.accuracy:.2f}, guessing "
            f"{one.chance:.2f})")


def _kept(figures: InterventionFigures, settings: GateSettings) -> Iterator[str]:
    for one in figures.kept:
        if _too_little(one, settings):
            yield (f"{one.attribute} is changed as well: kept in {one.share:.2f}, below {settings.effectiveness:g} x "
                   f"{one.accuracy:.2f}")


def _composition(composition: float | None, settings: GateSettings) -> Iterator[str]:
    if composition is None:
        yield "the generator gives values that are no numbers where no attribute is changed"
    elif composition > settings.composition:
        yield (f"composition {composition:.3f} is above {settings.composition:g}: images change where no attribute "
               "does")


def _reversibility(figures: InterventionFigures, settings: GateSettings) -> Iterator[str]:
    if figures.reversibility is None:
        yield "nothing is changed in the images"
    elif figures.reversibility > settings.reversibility:
        yield (f"reversibility {figures.reversibility:.2f} is above {settings.reversibility:g}: the way back does not "
               "lead to the original")


def anatomy_figure(figures: InterventionFigures, settings: GateSettings) -> tuple[str, float | None, float]:
    """What is asked about the anatomy: its name, the figure, and the least it must be."""
    if figures.dice_ratio is not None and figures.dice_originals is not None and figures.dice_originals >= LEAST_DICE:
        return "anatomy (Dice on counterfactuals relative to originals)", figures.dice_ratio, settings.anatomy
    return "anatomy (agreement of structure)", figures.structure, settings.structure


def _anatomy(figures: InterventionFigures, settings: GateSettings) -> Iterator[str]:
    name, found, least = anatomy_figure(figures, settings)
    if found is None:
        yield "the images have no structure that could be compared"
    elif found < least:
        yield f"{name} {found:.2f} is below {least:g}"


def _distance(figures: InterventionFigures, settings: GateSettings) -> Iterator[str]:
    before, after, real = figures.distance_before, figures.distance_after, figures.distance_real
    if before is None or after is None:
        return
    # two samples of the same group differ too: that much is no fault of the generator's
    if after > settings.distance * before + (real or 0.0):
        yield (f"the intensities' distance to the target group {after:.3f} is above {settings.distance:g} x "
               f"{before:.3f}, that of the originals, and {real or 0.0:.3f}, that of two real groups")


def _remarks(figures: InterventionFigures, settings: GateSettings) -> Iterator[str]:
    for one in figures.kept:
        if not _can_tell(one, settings):
            yield f"{_cannot_tell(one)}; whether it is kept is not known"
    unmet = [_words(target) for target in figures.targets if target.distance_after is None]
    if unmet:
        yield f"no held-out case has {listed(unmet, 3)}; the distance of those intensities is not known"
    if figures.dice_originals is not None and figures.dice_originals < LEAST_DICE:
        yield (f"the segmenter reaches a Dice of {figures.dice_originals:.2f} on originals, too little to judge by; "
               "the agreement of structure decides")


def _words(target: TargetFigures) -> str:
    return " and ".join(f"{name} {value}" for name, value in target.values.items())
