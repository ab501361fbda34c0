"""What the gate finds out, as plain data: JSON-ready, None where a figure cannot be known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ValueFigures:
    """How the predictor sees one value of an attribute.

    Attributes:
        value: as in the table.
        share: of the counterfactuals with this value that it takes for it; None without one.
        counterfactuals: how many there are.
        accuracy: share of the real held-out images with this value that it takes for it; None without one.
        real: how many there are.
    """

    value: str
    share: float | None
    counterfactuals: int
    accuracy: float | None
    real: int


@dataclass(frozen=True)
class AttributeFigures:
    """How the predictor sees one attribute.

    Attributes:
        attribute: its name.
        share: of a changed attribute: counterfactuals that are taken for their new value, averaged over the new values
            (effectiveness); of another one: counterfactuals that are taken for the same value as their originals.
        accuracy: on real held-out images, averaged over the values: the new ones, or all that occur.
        chance: accuracy of guessing.
        values: of a changed attribute, those that counterfactuals were given.
    """

    attribute: str
    share: float | None
    accuracy: float | None
    chance: float
    values: tuple[ValueFigures, ...] = ()

    @property
    def predictability(self) -> float | None:
        """The accuracy between 0, guessing, and 1, no errors."""
        return None if self.accuracy is None else (self.accuracy - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class Histogram:
    """Densities of one channel's intensities in the same bins.

    Attributes:
        edges: of the bins, one more than there are.
        originals, counterfactuals: of the images that were changed, before and after.
        real: of real held-out images that have the new values; None without one.
    """

    edges: tuple[float, ...]
    originals: tuple[float, ...]
    counterfactuals: tuple[float, ...]
    real: tuple[float, ...] | None


@dataclass(frozen=True)
class TargetFigures:
    """The counterfactuals of an intervention that were given the same values, beside real images that have them.

    Attributes:
        values: attribute -> new value.
        counterfactuals, real: how many images there are.
        distance_before, distance_after: of the originals' and the counterfactuals' intensities to those of the real
            held-out images, in standard deviations (`gate_measures.intensity_distance`).
        distance_real: of real training images with these values to the same: what chance alone makes.
        histograms: one for each channel.
    """

    values: Mapping[str, str]
    counterfactuals: int
    real: int
    distance_before: float | None
    distance_after: float | None
    distance_real: float | None
    histograms: tuple[Histogram, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether an intervention may be used.

    Attributes:
        passed: it may.
        reasons: in words, why not.
        remarks: in words, what could not be judged, and did not decide.
        ineffective: a changed attribute is not changed enough; a longer or a taught generator may mend that.
    """

    passed: bool
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    ineffective: bool = False

    @property
    def words(self) -> str:
        """One line."""
        said = "passed" if self.passed else "not passed: " + "; ".join(self.reasons)
        return said + "".join(f" (remark: {remark})" for remark in self.remarks)


@dataclass(frozen=True)
class InterventionFigures:
    """All figures of one intervention, on held-out images whose values of the changed attributes are known.

    Attributes:
        name: of the intervention.
        images, cases: how many were changed.
        effectiveness: of every attribute that is changed.
        kept: of every other binary or categorical one.
        reversibility: mean |x - back(there(x))| relative to mean |there(x) - x|; None where nothing changes.
        structure: agreement of structure between image and counterfactual (`gate_measures.structure_agreement`).
        structure_unrelated: the same between an image and the counterfactual of another one: what a figure means.
        dice_originals, dice_counterfactuals: of the small segmenter with the original's labels.
        distance_before, distance_after, distance_real: `TargetFigures`, averaged over the counterfactuals.
        change: mean |there(x) - x| in standard deviations.
        changed_share: of the voxels, see `gate_measures.changed_share`.
        targets: by the values that were given.
        not_finite: counterfactuals with values that are no numbers, there or back; with one all figures are unknown.
    """

    name: str
    images: int
    cases: int
    effectiveness: tuple[AttributeFigures, ...] = ()
    kept: tuple[AttributeFigures, ...] = ()
    reversibility: float | None = None
    structure: float | None = None
    structure_unrelated: float | None = None
    dice_originals: float | None = None
    dice_counterfactuals: float | None = None
    distance_before: float | None = None
    distance_after: float | None = None
    distance_real: float | None = None
    change: float | None = None
    changed_share: float | None = None
    targets: tuple[TargetFigures, ...] = ()
    not_finite: int = 0

    @property
    def dice_ratio(self) -> float | None:
        """Dice on counterfactuals relative to that on originals."""
        if self.dice_originals is None or self.dice_counterfactuals is None or self.dice_originals == 0:
            return None
        return self.dice_counterfactuals / self.dice_originals

    @property
    def distance_ratio(self) -> float | None:
        """The distance that is left, relative to that of the originals."""
        if self.distance_before is None or self.distance_after is None or self.distance_before == 0:
            return None
        return self.distance_after / self.distance_before


@dataclass(frozen=True)
class GateReport:
    """What the gate says about a generator.

    Attributes:
        interventions: the figures of every one.
        verdicts: of every one, in the same order.
        composition: mean |x - counterfactual(x, its own attributes)| in standard deviations; None with too few cases,
            or where it is no number.
        reconstruction: mean |x - reconstruction(x)| in standard deviations; it decides nothing.
        predictor: attribute -> balanced accuracy of the predictor on real held-out images, None where it is not known.
        images, cases: held-out ones that were looked at.
        training_cases: cases that predictor and segmenter learned from.
        settings: of the gate.
        seed: of all draws.
    """

    interventions: tuple[InterventionFigures, ...]
    verdicts: tuple[Verdict, ...]
    composition: float | None
    reconstruction: float | None
    predictor: Mapping[str, float | None]
    images: int
    cases: int
    training_cases: int
    settings: Mapping[str, Any]
    seed: int

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the interventions that may be used."""
        return tuple(one.name for one, verdict in zip(self.interventions, self.verdicts) if verdict.passed)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, every intervention with its verdict."""
        content = asdict(self)
        verdicts = content.pop("verdicts")
        for entry, verdict, one in zip(content["interventions"], verdicts, self.interventions):
            entry |= {"dice_ratio": one.dice_ratio, "distance_ratio": one.distance_ratio, "verdict": verdict}
        return {"passed": list(self.passed), **content}
