"""Results of the gate as plain data: JSON-ready, None for unknown values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ValueMetrics:
    """Predictions for images with one value of an attribute.

    Attributes:
        value: value as in the attribute table.
        share: fraction of counterfactuals with this value that are classified as it; None without any.
        counterfactuals: number of counterfactuals with this value.
        accuracy: fraction of real held-out images with this value that are classified as it; None without any.
        real: number of real held-out images with this value.
    """

    value: str
    share: float | None
    counterfactuals: int
    accuracy: float | None
    real: int


@dataclass(frozen=True)
class AttributeMetrics:
    """Predictions of one attribute.

    Attributes:
        attribute: name of the attribute.
        share: changed attribute: fraction of counterfactuals classified as their new value, averaged over the new
            values (effectiveness); other attribute: fraction classified as the same value as their originals.
        accuracy: accuracy on real held-out images, averaged over the new values of a changed attribute, or over all
            values that occur.
        chance: accuracy at chance level.
        values: metrics per new value of a changed attribute.
    """

    attribute: str
    share: float | None
    accuracy: float | None
    chance: float
    values: tuple[ValueMetrics, ...] = ()

    @property
    def predictability(self) -> float | None:
        """Accuracy rescaled to 0 at chance level and 1 without errors."""
        return None if self.accuracy is None else (self.accuracy - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class Histogram:
    """Densities of one channel's intensities in the same bins.

    Attributes:
        edges: edges of the bins, one more than bins.
        originals, counterfactuals: densities of the images before and after the intervention.
        real: density of real held-out images with the new values; None without any.
    """

    edges: tuple[float, ...]
    originals: tuple[float, ...]
    counterfactuals: tuple[float, ...]
    real: tuple[float, ...] | None


@dataclass(frozen=True)
class TargetMetrics:
    """Intensities of counterfactuals with the same new values, compared with real images that have these values.

    Attributes:
        values: attribute -> new value.
        counterfactuals, real: numbers of images.
        distance_before, distance_after: distance of the originals' and the counterfactuals' intensities to those of the
            real held-out images, in standard deviations (`metrics.intensity_distance`).
        distance_real: distance of real training images with these values to the same: the sampling noise.
        histograms: histograms of each channel.
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
    """Decision whether an intervention may be used.

    Attributes:
        passed: whether the intervention may be used.
        reasons: reasons for a rejection.
        remarks: aspects that could not be judged and did not affect the decision.
        ineffective: whether an attribute is not changed enough, which longer training or fine-tuning may fix.
    """

    passed: bool
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    ineffective: bool = False

    @property
    def summary(self) -> str:
        """Decision, reasons and remarks in one line."""
        decision = "passed" if self.passed else "not passed: " + "; ".join(self.reasons)
        return decision + "".join(f" (remark: {remark})" for remark in self.remarks)


@dataclass(frozen=True)
class InterventionMetrics:
    """Metrics of one intervention, on held-out images whose values of the changed attributes are known.

    Attributes:
        name: name of the intervention.
        images, cases: numbers of images and cases.
        effectiveness: metrics of every changed attribute.
        kept: metrics of every other binary or categorical attribute.
        reversibility: mean |x - back(there(x))| relative to mean |there(x) - x|; None where nothing changes.
        structure: structure agreement of image and counterfactual (`metrics.structure_agreement`).
        structure_unrelated: structure agreement of an image and the counterfactual of another image, for reference.
        dice_originals, dice_counterfactuals: Dice of the small segmenter with the originals' labels.
        distance_before, distance_after, distance_real: see `TargetMetrics`, averaged over the counterfactuals.
        change: mean |there(x) - x| in standard deviations.
        changed_share: fraction of changed voxels, see `metrics.changed_share`.
        targets: metrics by new values.
        not_finite: number of images with non-finite counterfactuals, there or back; if any, no metric is known.
    """

    name: str
    images: int
    cases: int
    effectiveness: tuple[AttributeMetrics, ...] = ()
    kept: tuple[AttributeMetrics, ...] = ()
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
    targets: tuple[TargetMetrics, ...] = ()
    not_finite: int = 0

    @property
    def dice_ratio(self) -> float | None:
        """Dice on counterfactuals relative to Dice on originals."""
        if self.dice_originals is None or self.dice_counterfactuals is None or self.dice_originals == 0:
            return None
        return self.dice_counterfactuals / self.dice_originals

    @property
    def distance_ratio(self) -> float | None:
        """Remaining distance relative to the originals' distance."""
        if self.distance_before is None or self.distance_after is None or self.distance_before == 0:
            return None
        return self.distance_after / self.distance_before


@dataclass(frozen=True)
class GateReport:
    """The gate's report on a generator.

    Attributes:
        interventions: metrics of every intervention.
        verdicts: verdict on every intervention, in the same order.
        composition: mean |x - counterfactual(x, its own attributes)| in standard deviations; None with too few cases
            or if not finite.
        reconstruction: mean |x - reconstruction(x)| in standard deviations; for information only.
        predictor: attribute -> balanced accuracy of the predictor on real held-out images; None if unknown.
        images, cases: numbers of held-out images and cases.
        training_cases: number of training cases of predictor and segmenter.
        settings: settings of the gate.
        seed: seed of all draws.
    """

    interventions: tuple[InterventionMetrics, ...]
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
        """Names of the interventions that passed."""
        return tuple(one.name for one, verdict in zip(self.interventions, self.verdicts) if verdict.passed)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready report, every intervention with its verdict."""
        content = asdict(self)
        verdicts = content.pop("verdicts")
        for entry, verdict, one in zip(content["interventions"], verdicts, self.interventions):
            entry |= {"dice_ratio": one.dice_ratio, "distance_ratio": one.distance_ratio, "verdict": verdict}
        return {"passed": list(self.passed), **content}
