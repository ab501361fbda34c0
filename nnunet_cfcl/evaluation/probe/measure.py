"""Measurement of frozen features, case by case, of several networks on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nnunet_cfcl.evaluation.probe import metrics
from nnunet_cfcl.evaluation.probe.features import Counterfactuals, SampledFeatures, dense_probe, read_features
from nnunet_cfcl.evaluation.probe.group_gap import gap_by_chance, group_gap
from nnunet_cfcl.evaluation.probe.linear_probe import FeatureScale, LinearProbe, balanced_weights, dice_per_class
from nnunet_cfcl.evaluation.probe.results import (
    CLASS_DISTANCE,
    COUNTERFACTUAL,
    DICE,
    KMEANS,
    METRICS,
    Estimate,
    ModelMetrics,
)
from nnunet_cfcl.evaluation.probe.set import ProbeSet, whole_labels
from nnunet_cfcl.evaluation.statistics import Draws, Numbers, PatientSums, patient_sums
from nnunet_cfcl.files.hashing import digest

#: Fewest cases of a group (scanner) that is compared.
FEWEST_IN_GROUP = 2


@dataclass(frozen=True)
class Probe:
    """Images, voxels and settings with which every network is measured.

    Attributes:
        images: probe set: cases and drawn voxels.
        change: counterfactuals of its patches.
        configuration: configuration of the plan.
        device: device of the networks.
        labels: foreground labels whose Dice is computed.
        column: column of attributes.csv that groups the cases.
        groups: case -> group, for cases of groups that are compared; empty: no groups are compared.
        seed: seed of clusters, pairs and resamples.
        step: step of the sliding window relative to the patch.
    """

    images: ProbeSet
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
        """Digest of images, voxels and counterfactuals; only metrics with the same digest are comparable."""
        return digest([self.images.digest, self.change.source.identity(), self.change.seed])

    @property
    def patients(self) -> list[str]:
        """Patient of each validation case."""
        return [self.images.patients.of(case) for case in self.images.validation]

    def measure(self, network: nn.Module, name: str, file: Path | None, weights: str) -> ModelMetrics:
        """Compute all metrics of a network; features of the drawn voxels and one image are in memory at a time."""
        images = self.images
        training = read_features(network, images.reader, images.training_patches, self.device,
                                 what=f"{name}: training features")
        scale = FeatureScale.of(training.features, training.labels)
        shares = np.array([images.shares[int(label)] for label in np.unique(training.labels)])
        classifier = LinearProbe.fit(training.features, training.labels, scale, shares)
        dice = self._dice(network, classifier, name)
        sampled = read_features(network, images.reader, images.validation_patches, self.device, self.change,
                                f"{name}: validation features")
        values, means, apart = voxel_metrics(sampled, scale, images.validation, self.seed)
        # a class in neither map has no Dice
        known = np.array(list(dice.values()))
        values[DICE] = np.array([np.nanmean(column) if np.isfinite(column).any() else np.nan for column in known.T])
        draws = Draws(self.seed)
        estimates = {key: Estimate.of(patient_sums(values[key], self.patients), draws) for key in METRICS}
        if self.groups:
            estimates[f"{self.column}_gap"] = self._gap(means, apart, draws)
        return ModelMetrics(
            name, file, weights, images.validation, {key: values[key] for key in METRICS}, dice, estimates,
            {label: Estimate.of(patient_sums(column, self.patients), draws) for label, column in dice.items()},
            tuple(sorted({int(label) for label in np.unique(sampled.labels)}
                         - {int(label) for label in classifier.classes})))

    def _dice(self, network: nn.Module, classifier: LinearProbe, name: str) -> dict[int, Numbers]:
        """Dice of the classifier's label maps: label -> (cases,)."""
        reader, cases, rows = self.images.reader, self.images.validation, []
        truths = whole_labels(reader, cases)
        with dense_probe(network, classifier.weight, classifier.bias, self.configuration, self.device,
                         self.step) as predict:
            for case, truth in zip(tqdm(cases, desc=f"{name}: label maps", unit="case", disable=None), truths):
                image = reader.read(case, tuple(slice(0, n) for n in truth.shape))
                found = classifier.classes[predict(image)]
                rows.append(dice_per_class(truth, found, self.labels, self.images.ignore_label))
        return dict(zip(self.labels, np.stack(rows, axis=1)))

    def _gap(self, means: Numbers, apart: float, draws: Draws) -> Estimate:
        rows = np.array([case in self.groups for case in self.images.validation])
        groups = [self.groups[case] for case in self.images.validation if case in self.groups]
        patients = [patient for patient, known in zip(self.patients, rows) if known]

        def gap(permuted: Sequence[str]) -> PatientSums:
            return group_gap(means[rows], permuted, patients, apart)

        chance = gap_by_chance(
            lambda permuted: gap(permuted).estimate, groups, patients, np.random.default_rng([self.seed, 1]))
        return Estimate.of(gap(groups), draws, chance)


def voxel_metrics(
    sampled: SampledFeatures, scale: FeatureScale, cases: Sequence[str], seed: int
) -> tuple[dict[str, Numbers], Numbers, float]:
    """Metrics of the drawn voxels.

    Args:
        sampled: features of validation cases and of their counterfactuals.
        scale: standardisation of the features.
        cases: cases of the rows of the result; a case without voxels has NaN.
        seed: seed of clusters and pairs.

    Returns:
        Metric -> (cases,), without the probe's Dice; class means (cases, K, F) of standardised features; mean distance
        between class means.
    """
    features, labels = scale(sampled.features), sampled.labels
    classes, weights = np.unique(labels), balanced_weights(labels)
    means = metrics.class_means(features, labels, classes)
    apart = metrics.distance_of_means(means)
    between = metrics.distance_between_classes(features, labels, np.random.default_rng([seed, 0]), weights)
    right = (metrics.matched_clusters(features, labels, seed, weights) == labels).astype(np.float64)
    moved = np.linalg.norm(scale(sampled.moved) - features, axis=1)
    own = [sampled.cases == case for case in cases]

    def of_cases(metric: Callable[[Any], float]) -> Numbers:
        return np.array([metric(voxels) if voxels.any() else np.nan for voxels in own])

    return {
        KMEANS: of_cases(lambda voxels: metrics.mean_over_classes(right[voxels], labels[voxels])),
        CLASS_DISTANCE: of_cases(lambda voxels: apart / max(1e-12, metrics.std_within_classes(
            features[voxels], labels[voxels], classes, means))),
        COUNTERFACTUAL: of_cases(lambda voxels: metrics.mean_over_classes(moved[voxels], labels[voxels]) / between),
    }, np.stack([metrics.class_means(features[voxels], labels[voxels], classes) for voxels in own]), apart


def comparable_groups(cells: Mapping[str, str]) -> dict[str, str]:
    """Drop groups of fewer than `FEWEST_IN_GROUP` cases; empty where fewer than two groups are left.

    Args:
        cells: case -> group, of cases whose group is known.
    """
    groups = list(cells.values())
    kept = {case: group for case, group in cells.items() if groups.count(group) >= FEWEST_IN_GROUP}
    return kept if len(set(kept.values())) > 1 else {}
