"""Results of a probe: metrics of each model with intervals, and paired differences between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_cfcl.evaluation.statistics import Draws, Numbers, PatientSums, patient_sums


@dataclass(frozen=True)
class MetricDescription:
    """Description of a metric for readers.

    Attributes:
        title: short name, for tables.
        words: definition in one or two sentences.
        more_is_better: direction of the metric.
    """

    title: str
    words: str
    more_is_better: bool


DICE, KMEANS, CLASS_DISTANCE, COUNTERFACTUAL = METRICS = (
    "probe_dice", "kmeans_accuracy", "class_distance", "counterfactual_distance")
DESCRIPTIONS = {
    DICE: MetricDescription(
        "linear probe Dice", "Dice of a linear classifier of the frozen features on all voxels of a validation case, "
        "mean of the foreground classes; trained on class-balanced voxels of training cases; 1 is perfect.", True),
    KMEANS: MetricDescription(
        "k-means accuracy", "Share of voxels whose cluster is matched to their class, averaged over the classes; "
        "k-means without labels, one cluster per class, matched afterwards. Chance is about 1 / number of classes.",
        True),
    CLASS_DISTANCE: MetricDescription(
        "class distance / std", "Mean distance between class means, divided by the root mean square distance of a "
        "case's voxels from the mean of their class over all cases.", True),
    COUNTERFACTUAL: MetricDescription(
        "counterfactual distance", "Mean distance between a voxel and the same voxel in the counterfactual, relative "
        "to the mean distance between voxels of different classes; 0 is full invariance, at 1 the scanner moves a "
        "voxel as far as another class is away.", False),
}


def gap_description(column: str) -> MetricDescription:
    """Description of the metric ``<column>_gap``."""
    return MetricDescription(
        f"{column} gap", f"Distance between the class means of two groups of cases ({column}), averaged over the "
        "classes, relative to the mean distance between classes; 0: none. \"By chance\" is the mean gap under a random "
        f"permutation of {column}.", False)


@dataclass(frozen=True)
class Estimate:
    """Mean of a metric over the validation cases.

    Attributes:
        mean: NaN where no case has a value.
        low: lower end of the 95 % interval over patients; NaN with fewer than two patients.
        high: upper end.
        by_chance: value expected without an effect; None where that is 0 or irrelevant.
    """

    mean: float
    low: float
    high: float
    by_chance: float | None = None

    @classmethod
    def of(cls, data: PatientSums, draws: Draws, by_chance: float | None = None) -> Estimate:
        """Mean and interval of values summed per patient."""
        mean = data.estimate if len(data.sums) else float("nan")
        return cls(mean, *draws.interval(data), by_chance)


@dataclass(frozen=True)
class ModelMetrics:
    """Metrics of one network.

    Attributes:
        name: name of the model.
        file: checkpoint; None: no weights were loaded.
        weights: digest of all weights except the segmentation layers'.
        cases: validation cases.
        values: metric -> values (cases,), NaN where a case has none.
        dice: label -> Dice (cases,) of the linear probe.
        estimates: metric -> mean and interval, with the gap of the groups.
        dice_estimates: label -> mean and interval of the linear probe's Dice.
        unseen: labels of the validation cases without a drawn training voxel; their Dice is 0.
    """

    name: str
    file: Path | None
    weights: str
    cases: tuple[str, ...]
    values: Mapping[str, Numbers]
    dice: Mapping[int, Numbers]
    estimates: Mapping[str, Estimate]
    dice_estimates: Mapping[int, Estimate]
    unseen: tuple[int, ...]


@dataclass(frozen=True)
class PairedDifference:
    """Difference of one metric between a model and the first model, case by case.

    The field names are keys of ``probe.json``.

    Attributes:
        model: name of the model.
        against: name of the first model.
        figure: a metric of `METRICS`.
        cases: number of cases with a value of both models.
        difference: mean of (model - against).
        low: lower end of the 95 % interval over patients.
        high: upper end.
        p_value: two-sided sign-flip test over patients, not corrected for multiple comparisons.
    """

    model: str
    against: str
    figure: str
    cases: int
    difference: float
    low: float
    high: float
    p_value: float


def paired_differences(models: Sequence[ModelMetrics], patients: Sequence[str], seed: int) -> list[PairedDifference]:
    """Compare every model after the first with the first."""
    first, *others = models
    draws, records = Draws(seed), []
    for other in others:
        for metric in METRICS:
            values = other.values[metric] - first.values[metric]
            data, count = patient_sums(values, patients), int(np.isfinite(values).sum())
            records.append(PairedDifference(
                other.name, first.name, metric, count, data.estimate, *draws.interval(data),
                draws.p_value(data) if count else float("nan")))
    return records
