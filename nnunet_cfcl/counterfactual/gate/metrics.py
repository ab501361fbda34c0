"""The gate's metrics of an intervention: effectiveness, composition, reversibility, anatomy, distance of intensities.

The first three follow Monteiro et al. 2023, "Measuring axiomatic soundness of counterfactual image models" (arXiv
2303.01274, section 3), with an attribute predictor as the pseudo-oracle of effectiveness. Anatomy and the distance of
intensities are added because the counterfactuals are used for segmentation with the original's labels, as images of
the other group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nnunet_cfcl.counterfactual.gate.attribute_predictor import (
    accuracy_by_value,
    balanced,
    value_indices,
)
from nnunet_cfcl.counterfactual.gate.cases import (
    Changed,
    counterfactuals_of,
    intervene,
    subset,
)
from nnunet_cfcl.counterfactual.gate.image_pairs import (
    changed_share,
    edge_strength,
    intensity_distance,
    mean_change,
    structure_agreement,
)
from nnunet_cfcl.counterfactual.gate.judges import GATE_KEY, Judges
from nnunet_cfcl.counterfactual.gate.results import (
    AttributeMetrics,
    Histogram,
    InterventionMetrics,
    TargetMetrics,
    ValueMetrics,
)
from nnunet_cfcl.counterfactual.gate.small_segmenter import dice_scores
from nnunet_cfcl.counterfactual.gate.verdict import FEWEST_CASES, NOTHING
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, is_missing

#: Raise it with every change of a metric here or in `image_pairs`, of a judge (`attribute_predictor`,
#: `small_segmenter`, `small_training`) or of the verdict's rules: verdicts of an earlier version are then not reused.
GATE_VERSION = 1
BINS = 60


def composition(judges: Judges) -> float | None:
    """Mean change of the held-out images under the null intervention, in standard deviations."""
    held = judges.held_out
    same = counterfactuals_of(judges.generator, held.images, held.cells, held.cells)
    return finite_or_none(mean_change(same, held.images, judges.std))


def intervention_metrics(judges: Judges, intervention: Intervention, number: int) -> InterventionMetrics:
    """Compute all metrics of an intervention on the held-out images.

    Args:
        judges: judges of `train_judges`.
        intervention: intervention to evaluate.
        number: its number, part of the key of its random draws.
    """
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
        reversibility=reversibility(judges, changed, back),
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
                            real_accuracy(judges, attribute), 1 / len(attribute.values))


def real_accuracy(judges: Judges, attribute: Attribute) -> float | None:
    """Balanced accuracy of the attribute predictor on the real held-out images."""
    values = value_indices(attribute, judges.held_out.cells)
    return balanced(accuracy_by_value(judges.predicted[attribute.name], values))


def reversibility(judges: Judges, changed: Changed, back: Tensor) -> float | None:
    """Mean difference after going there and back, relative to the change of going there; None without a change.

    The paper takes the absolute difference, by which a weak intervention would look reversible.

    Args:
        judges: judges of `train_judges`.
        changed: originals and their counterfactuals.
        back: (N, C, *S) counterfactuals of the counterfactuals, with the original values.
    """
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


def finite_or_none(value: float) -> float | None:
    """The value, or None if it is not finite, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def _mean(values: Tensor) -> float | None:
    """Mean of the known values; None without any."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else None
