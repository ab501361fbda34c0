"""The gate: evaluation of every intervention of a trained generator on held-out patients, before it is used.

Effectiveness, composition and reversibility follow Monteiro et al. 2023, "Measuring axiomatic soundness of
counterfactual image models" (arXiv 2303.01274, section 3), with an attribute predictor as the pseudo-oracle of
effectiveness. Anatomy and the intensities' distance are added because the counterfactuals are used for segmentation
with the original's labels, as images of the other group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.attribute_predictor import (
    AttributePredictor,
    accuracy_by_value,
    balanced,
    train_predictor,
    value_indices,
)
from nnunet_cfcl.counterfactual.gate.cases import (
    Changed,
    JudgedGenerator,
    balanced_choice,
    counterfactuals_of,
    intervene,
    reconstructions_of,
    subset,
)
from nnunet_cfcl.counterfactual.gate.metrics import (
    changed_share,
    channel_std,
    edge_strength,
    intensity_distance,
    mean_change,
    structure_agreement,
)
from nnunet_cfcl.counterfactual.gate.results import (
    AttributeMetrics,
    GateReport,
    Histogram,
    InterventionMetrics,
    TargetMetrics,
    ValueMetrics,
)
from nnunet_cfcl.counterfactual.gate.small_segmenter import SmallSegmenter, dice_scores, train_segmenter
from nnunet_cfcl.counterfactual.gate.verdict import FEWEST_CASES, NOTHING, verdict_on
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, is_missing
from nnunet_cfcl.errors import listed
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.runs.watchdog import beat, watched

#: Part of the keys of all random numbers of the gate, so that its networks differ from others of the same seed.
GATE_KEY = 0x67617465
BINS = 60


@dataclass(frozen=True)
class Judges:
    """Judging networks and images, shared by all interventions.

    Attributes:
        generator: generator to evaluate.
        training: training patches of predictor and segmenter.
        held_out: patches for the evaluation.
        predictor: judge of the attributes.
        segmenter: judge of the anatomy; None without labels.
        std: (C,) standard deviation of the held-out images.
        predicted: attribute -> (N,) predicted value of the held-out images.
        seed: seed of all draws.
    """

    generator: JudgedGenerator
    training: Patches
    held_out: Patches
    predictor: AttributePredictor
    segmenter: SmallSegmenter | None
    std: Tensor
    predicted: Mapping[str, Tensor]
    seed: int


def judge(
    generator: JudgedGenerator, training: Patches, held_out: Patches, interventions: Sequence[Intervention],
    settings: GateSettings, seed: int,
) -> GateReport:
    """Train judges and evaluate every intervention; reproducible.

    Args:
        generator: trained generator.
        training: patches of the generator's training patients, on which the judging networks are trained.
        held_out: patches of other patients; at most ``settings.cases`` of them are used.
        interventions: interventions to evaluate.
        settings: limits, number of images, training steps.
        seed: seed of the run; the judging networks use random numbers of their own.

    Raises:
        ValueError: a case is in both sets, a set is empty, or no attribute is binary or categorical.
    """
    return evaluate(train_judges(generator, training, held_out, settings, seed), interventions, settings)


def train_judges(
    generator: JudgedGenerator, training: Patches, held_out: Patches, settings: GateSettings, seed: int
) -> Judges:
    """Train the judging networks and choose the held-out images; arguments and errors as in `judge`.

    ``dataclasses.replace(judges, generator=another)`` evaluates another generator of the same attributes and intensity
    scale with the same networks.
    """
    if both := sorted(set(training.cases) & set(held_out.cases)):
        raise ValueError(f"held-out and training cases must be disjoint, found {listed(both)} in both")
    if not len(training) or not len(held_out):
        raise ValueError("expected training and held-out patches, found none")
    chosen = balanced_choice(held_out, generator.coding, settings.cases, seed)
    own = generator_for(seed, GATE_KEY).initial_seed()
    predictor = train_predictor(
        training, generator.coding, "plain", settings.predictor_steps, own, generator.device, generator.scale)
    segmenter = None if chosen.labels is None else train_segmenter(
        training, settings.segmenter_steps, own, generator.device, generator.scale)
    return Judges(generator, training, chosen, predictor, segmenter, channel_std(chosen.images),
                  predictor.predictions(chosen.images), seed)


@watched("the gate")
def evaluate(judges: Judges, interventions: Sequence[Intervention], settings: GateSettings) -> GateReport:
    """Evaluate every intervention with trained judges.

    Args:
        judges: judges of `train_judges`.
        interventions: interventions to evaluate.
        settings: limits of the metrics.
    """
    held = judges.held_out
    enough = len(set(held.cases)) >= FEWEST_CASES
    metrics = tuple(_metrics(judges, one, number) for number, one in enumerate(interventions))
    composition = _composition(judges) if enough else None
    reconstructed = _number(mean_change(
        reconstructions_of(judges.generator, held), held.images, judges.std)) if enough else None
    return GateReport(
        metrics, tuple(verdict_on(one, composition, settings) for one in metrics), composition, reconstructed,
        {one.name: _real_accuracy(judges, one) for one in judges.predictor.attributes},
        len(held), len(set(held.cases)), len(set(judges.training.cases)), asdict(settings), judges.seed)


def _composition(judges: Judges) -> float | None:
    held = judges.held_out
    same = counterfactuals_of(judges.generator, held.images, held.cells, held.cells)
    return _number(mean_change(same, held.images, judges.std))


def _metrics(judges: Judges, intervention: Intervention, number: int) -> InterventionMetrics:
    beat()
    held = judges.held_out
    known = [place for place, cells in enumerate(held.cells)
             if not any(is_missing(cells.get(one.name, "")) for one in intervention.attributes)]
    cases = len({held.cases[place] for place in known})
    empty = InterventionMetrics(intervention.name, len(known), cases)
    if cases < FEWEST_CASES:
        return empty
    changed = intervene(judges.generator, subset(held, known), intervention, (judges.seed, GATE_KEY, number))
    changed = changed._replace(places=torch.tensor(known)[changed.places])
    back = counterfactuals_of(judges.generator, changed.counterfactuals, changed.cells, [held.cells[n] for n in known])
    broken = ~(changed.counterfactuals.isfinite() & back.isfinite()).flatten(1).all(1)
    if broken.any():
        return replace(empty, not_finite=int(broken.sum()))
    targets = tuple(_targets(judges, intervention, changed))
    predicted = judges.predictor.predictions(changed.counterfactuals)
    dice = _dice(judges, changed)
    edges = [edge_strength(images) for images in (changed.originals, changed.counterfactuals)]
    return replace(
        empty,
        effectiveness=tuple(_effect(judges, one, changed, predicted[one.name]) for one in intervention.attributes),
        kept=tuple(_kept(judges, one, changed, predicted[one.name]) for one in judges.predictor.attributes
                   if one not in intervention.attributes),
        reversibility=_reversibility(judges, changed, back),
        structure=_mean(structure_agreement(*edges)),
        structure_unrelated=_mean(structure_agreement(edges[0], edges[1].roll(1, 0))),
        dice_originals=dice[0], dice_counterfactuals=dice[1],
        distance_before=_average(targets, "distance_before"), distance_after=_average(targets, "distance_after"),
        distance_real=_average(targets, "distance_real"),
        change=mean_change(changed.originals, changed.counterfactuals, judges.std),
        changed_share=changed_share(changed.originals, changed.counterfactuals, judges.std), targets=targets)


def _effect(judges: Judges, attribute: Attribute, changed: Changed, predicted: Tensor) -> AttributeMetrics:
    """Effectiveness, averaged over the new values like the accuracy on real images."""
    name = attribute.name
    given, real = value_indices(attribute, changed.cells), value_indices(attribute, judges.held_out.cells)
    shares, right = accuracy_by_value(predicted, given), accuracy_by_value(judges.predicted[name], real)
    values = tuple(
        ValueMetrics(attribute.values[value], share, int((given == value).sum()), right.get(value),
                     int((real == value).sum()))
        for value, share in shares.items())
    known = [value.accuracy for value in values if value.accuracy is not None]
    return AttributeMetrics(
        name, sum(shares.values()) / len(shares), sum(known) / len(known) if len(known) == len(values) else None,
        1 / len(attribute.values), values)


def _kept(judges: Judges, attribute: Attribute, changed: Changed, predicted: Tensor) -> AttributeMetrics:
    before = judges.predicted[attribute.name][changed.places]
    return AttributeMetrics(attribute.name, float((predicted == before).float().mean()),
                            _real_accuracy(judges, attribute), 1 / len(attribute.values))


def _real_accuracy(judges: Judges, attribute: Attribute) -> float | None:
    values = value_indices(attribute, judges.held_out.cells)
    return balanced(accuracy_by_value(judges.predicted[attribute.name], values))


def _reversibility(judges: Judges, changed: Changed, back: Tensor) -> float | None:
    """Remaining difference relative to the change (not absolute as in the paper): weak interventions gain nothing."""
    there = mean_change(changed.originals, changed.counterfactuals, judges.std)
    return None if there < NOTHING else mean_change(changed.originals, back, judges.std) / there


def _dice(judges: Judges, changed: Changed) -> tuple[float | None, float | None]:
    """Dice of the segmenter on originals and counterfactuals, both with the originals' labels."""
    if judges.segmenter is None or judges.held_out.labels is None:
        return None, None
    truth = judges.held_out.labels[changed.places]
    foreground = [label for label in judges.segmenter.labels if label > 0]
    scores = [dice_scores(judges.segmenter.segment(images), truth, foreground)
              for images in (changed.originals, changed.counterfactuals)]
    return _mean(scores[0]), _mean(scores[1])


def _targets(judges: Judges, intervention: Intervention, changed: Changed) -> list[TargetMetrics]:
    """Metrics by new values, sorted."""
    names = [attribute.name for attribute in intervention.attributes]
    given = [tuple(cells[name] for name in names) for cells in changed.cells]
    return [_target(judges, dict(zip(names, values)), changed, torch.tensor([one == values for one in given]))
            for values in sorted(set(given))]


def _target(judges: Judges, values: Mapping[str, str], changed: Changed, which: Tensor) -> TargetMetrics:
    before, after = changed.originals[which], changed.counterfactuals[which]
    real, learned = (_with_values(patches, values) for patches in (judges.held_out, judges.training))
    distances = [intensity_distance(one, real, judges.std) if len(real) and len(one) else None
                 for one in (before, after, learned)]
    histograms = [_histogram(*(images[:, channel] for images in (before, after, real)))
                  for channel in range(before.shape[1])]
    return TargetMetrics(values, len(before), len(real), distances[0], distances[1], distances[2], tuple(histograms))


def _with_values(patches: Patches, values: Mapping[str, str]) -> Tensor:
    """Images of the cases with all of these values."""
    return patches.images[torch.tensor([all(cells.get(name) == value for name, value in values.items())
                                        for cells in patches.cells], dtype=torch.bool)]


def _histogram(before: Tensor, after: Tensor, real: Tensor) -> Histogram:
    """Histogram of one channel between the 0.5 and 99.5 percentiles of all images."""
    parts = [np.asarray(images).ravel() for images in (before, after, real)]
    low, high = np.quantile(np.concatenate(parts), [0.005, 0.995])
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    densities = [tuple((np.histogram(part, edges)[0] / max(1, part.size) / np.diff(edges)).tolist()) for part in parts]
    return Histogram(tuple(edges.tolist()), densities[0], densities[1], densities[2] if len(real) else None)


def _average(targets: Sequence[TargetMetrics], metric: str) -> float | None:
    """Average over the counterfactuals with known metric."""
    known = [(getattr(one, metric), one.counterfactuals) for one in targets if getattr(one, metric) is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


def _number(value: float) -> float | None:
    """The value, or None if it is not finite, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def _mean(values: Tensor) -> float | None:
    """Mean of the known values; None without any."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None
