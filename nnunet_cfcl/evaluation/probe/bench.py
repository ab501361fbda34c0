"""The figures of frozen features, per case, of one network after the other on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nnunet_cfcl.evaluation.probe import measures as probes
from nnunet_cfcl.evaluation.probe.features import Counterfactuals, SampledFeatures, dense_probe, read_features
from nnunet_cfcl.evaluation.probe.set import ProbeSet, whole_labels
from nnunet_cfcl.evaluation.statistics import Draws, Numbers, PatientSums, patient_sums
from nnunet_cfcl.files.hashing import digest

#: Cases that a group (scanner) needs.
FEWEST_IN_GROUP = 2


@dataclass(frozen=True)
class Meaning:
    """A figure.

    Attributes:
        title: short, for tables.
        words: what it is.
        more_is_better: or less.
    """

    title: str
    words: str
    more_is_better: bool


DICE, KMEANS, CLASS_DISTANCE, COUNTERFACTUAL = FIGURES = (
    "probe_dice", "kmeans_accuracy", "class_distance", "counterfactual_distance")
MEANINGS = {
    DICE: Meaning("linear probe Dice", "Dice of a linear classifier of the frozen features on all voxels of a "
                  "validation case, mean of the foreground classes; learned from class-balanced voxels of training "
                  "cases; 1 is perfect.", True),
    KMEANS: Meaning("k-means accuracy", "Share of the voxels, classes weighing the same, whose cluster stands for "
                    "their class; k-means without labels, one cluster per class, matched afterwards. About 1 / number "
                    "of classes is chance.", True),
    CLASS_DISTANCE: Meaning("class distance / spread", "Mean distance between class means over the root mean square "
                            "distance of a case's voxels from the mean of their class over all cases.", True),
    COUNTERFACTUAL: Meaning("counterfactual distance", "Mean distance between a voxel and the same voxel in the "
                            "counterfactual, relative to the mean distance between voxels of different classes; 0 is "
                            "full invariance, at 1 the scanner moves a voxel as far as another class is away.", False),
}


def gap_meaning(column: str) -> Meaning:
    """Of the figure ``<column>_gap``."""
    return Meaning(f"{column} gap", f"Distance between the class means of two groups of cases ({column}), mean over "
                   "the classes, relative to the mean distance between classes; 0: none. Also how large it would be "
                   f"if the {column} were dealt out at random (by chance).", False)


@dataclass(frozen=True)
class Figure:
    """A mean over the validation cases.

    Attributes:
        mean: NaN where there is none.
        low, high: 95 % interval over patients; NaN with fewer than two.
        by_chance: what it would be without an effect; None where that is 0 or no matter.
    """

    mean: float
    low: float
    high: float
    by_chance: float | None = None


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one network.

    Attributes:
        name: of the model.
        file: its weights; None: none were loaded.
        weights: digest of all weights but the segmentation layers'.
        cases: validation cases.
        values: figure -> (cases,), NaN where there is none.
        dice: label -> (cases,).
        figures: figure -> mean and interval, the gap of the groups too.
        dice_figures: label -> mean and interval.
        unseen: labels of the validation cases that no drawn training voxel has; their Dice is 0.
    """

    name: str
    file: Path | None
    weights: str
    cases: tuple[str, ...]
    values: Mapping[str, Numbers]
    dice: Mapping[int, Numbers]
    figures: Mapping[str, Figure]
    dice_figures: Mapping[int, Figure]
    unseen: tuple[int, ...]


@dataclass(frozen=True)
class Bench:
    """All that networks are measured with.

    Attributes:
        material: images and voxels.
        change: their counterfactuals.
        configuration: of the plan.
        device: that networks are on.
        labels: foreground labels whose Dice is taken.
        column: of the groups.
        groups: case -> group, of the cases whose groups are compared; empty: none are.
        seed: of clusters, pairs and resamples.
        step: distance of sliding windows relative to the patch.
    """

    material: ProbeSet
    change: Counterfactuals
    configuration: Any
    device: torch.device
    labels: tuple[int, ...]
    column: str
    groups: Mapping[str, str]
    seed: int
    step: float = 0.5

    @property
    def image_set(self) -> str:
        """Digest of images, voxels and counterfactuals; only figures of the same can be compared."""
        return digest([self.material.digest, self.change.source.identity(), self.change.seed])

    @property
    def patients(self) -> list[str]:
        """Of the validation cases."""
        return [self.material.patients.of(case) for case in self.material.validation]

    def measure(self, network: nn.Module, name: str, file: Path | None, weights: str) -> ModelFigures:
        """All figures of a network; features of few voxels, and one image, are in memory at the same time."""
        material = self.material
        training = read_features(network, material.reader, material.training_patches, self.device,
                                 what=f"{name}: training features")
        scale = probes.FeatureScale.of(training.features, training.labels)
        shares = np.array([material.shares[int(one)] for one in np.unique(training.labels)])
        probe = probes.LinearProbe.fit(training.features, training.labels, scale, shares)
        dice = self._dice(network, probe, name)
        sampled = read_features(network, material.reader, material.validation_patches, self.device, self.change,
                                f"{name}: validation features")
        values, means, apart = voxel_figures(sampled, scale, material.validation, self.seed)
        # a class in neither map has no Dice
        known = np.array(list(dice.values()))
        values[DICE] = np.array([np.nanmean(column) if np.isfinite(column).any() else np.nan for column in known.T])
        draws = Draws(self.seed)
        figures = {key: _figure(patient_sums(values[key], self.patients), draws) for key in FIGURES}
        if self.groups:
            figures[f"{self.column}_gap"] = self._gap(means, apart, draws)
        return ModelFigures(
            name, file, weights, material.validation, {key: values[key] for key in FIGURES}, dice, figures,
            {label: _figure(patient_sums(column, self.patients), draws) for label, column in dice.items()},
            tuple(sorted({int(one) for one in np.unique(sampled.labels)} - {int(one) for one in probe.classes})))

    def _dice(self, network: nn.Module, probe: probes.LinearProbe, name: str) -> dict[int, Numbers]:
        """Label -> (cases,)."""
        reader, cases, rows = self.material.reader, self.material.validation, []
        truths = whole_labels(reader, cases)
        with dense_probe(network, probe.weight, probe.bias, self.configuration, self.device, self.step) as predict:
            for case, truth in zip(tqdm(cases, desc=f"{name}: label maps", unit="case", disable=None), truths):
                image = reader.read(case, tuple(slice(0, n) for n in truth.shape))
                found = probe.classes[predict(image)]
                rows.append(probes.dice_per_class(truth, found, self.labels, self.material.ignore_label))
        return dict(zip(self.labels, np.stack(rows, axis=1)))

    def _gap(self, means: Numbers, apart: float, draws: Draws) -> Figure:
        rows = np.array([case in self.groups for case in self.material.validation])
        groups = [self.groups[case] for case in self.material.validation if case in self.groups]
        patients = [patient for patient, known in zip(self.patients, rows) if known]

        def gap(dealt: Sequence[str]) -> PatientSums:
            return probes.group_gap(means[rows], dealt, patients, apart)

        chance = probes.gap_by_chance(
            lambda dealt: gap(dealt).estimate, groups, patients, np.random.default_rng([self.seed, 1]))
        return _figure(gap(groups), draws, chance)


def voxel_figures(
    sampled: SampledFeatures, scale: probes.FeatureScale, cases: Sequence[str], seed: int
) -> tuple[dict[str, Numbers], Numbers, float]:
    """What drawn voxels tell.

    Args:
        sampled: features of validation cases and of their counterfactuals.
        scale: of the features.
        cases: the rows of the result; one without voxels has NaN.
        seed: of clusters and pairs.

    Returns:
        Figure -> (cases,), without the probe's Dice; class means (cases, K, F) of standardised features; mean distance
        between class means.
    """
    features, labels = scale(sampled.features), sampled.labels
    classes, weights = np.unique(labels), probes.balanced_weights(labels)
    means = probes.class_means(features, labels, classes)
    apart = probes.distance_of_means(means)
    between = probes.distance_between_classes(features, labels, np.random.default_rng([seed, 0]), weights)
    right = (probes.matched_clusters(features, labels, seed, weights) == labels).astype(np.float64)
    moved = np.linalg.norm(scale(sampled.moved) - features, axis=1)
    own = [sampled.cases == case for case in cases]

    def of_cases(figure: Callable[[Any], float]) -> Numbers:
        return np.array([figure(voxels) if voxels.any() else np.nan for voxels in own])

    return {
        KMEANS: of_cases(lambda voxels: probes.mean_over_classes(right[voxels], labels[voxels])),
        CLASS_DISTANCE: of_cases(lambda voxels: apart / max(1e-12, probes.spread_within_classes(
            features[voxels], labels[voxels], classes, means))),
        COUNTERFACTUAL: of_cases(lambda voxels: probes.mean_over_classes(moved[voxels], labels[voxels]) / between),
    }, np.stack([probes.class_means(features[voxels], labels[voxels], classes) for voxels in own]), apart


def comparable_groups(cells: Mapping[str, str]) -> dict[str, str]:
    """Case -> group without groups of fewer than `FEWEST_IN_GROUP` cases; empty where fewer than two are left.

    Args:
        cells: case -> group, of cases whose group is known.
    """
    groups = list(cells.values())
    kept = {case: group for case, group in cells.items() if groups.count(group) >= FEWEST_IN_GROUP}
    return kept if len(set(kept.values())) > 1 else {}


@dataclass(frozen=True)
class PairedDifference:
    """One figure of a model minus that of the first, case by case.

    Attributes:
        model, against: their names.
        figure: one of `FIGURES`.
        cases: with a value of both.
        difference, low, high: mean and 95 % interval over patients.
        p_value: of the sign-flip test over patients, of no other comparison.
    """

    model: str
    against: str
    figure: str
    cases: int
    difference: float
    low: float
    high: float
    p_value: float


def paired_differences(models: Sequence[ModelFigures], patients: Sequence[str], seed: int) -> list[PairedDifference]:
    """Every model after the first against the first."""
    first, *others = models
    draws, records = Draws(seed), []
    for other in others:
        for figure in FIGURES:
            values = other.values[figure] - first.values[figure]
            data, count = patient_sums(values, patients), int(np.isfinite(values).sum())
            records.append(PairedDifference(
                other.name, first.name, figure, count, data.estimate, *draws.interval(data),
                draws.p_value(data) if count else float("nan")))
    return records


def _figure(data: PatientSums, draws: Draws, by_chance: float | None = None) -> Figure:
    mean = data.estimate if len(data.sums) else float("nan")
    return Figure(mean, *draws.interval(data), by_chance)
