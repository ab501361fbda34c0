"""The gate: evaluation of every intervention of a trained generator on held-out patients, before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.cases import (
    JudgedGenerator,
    reconstructions_of,
)
from nnunet_cfcl.counterfactual.gate.image_pairs import (
    mean_change,
)
from nnunet_cfcl.counterfactual.gate.judges import Judges, train_judges
from nnunet_cfcl.counterfactual.gate.metrics import composition, finite_or_none, intervention_metrics, real_accuracy
from nnunet_cfcl.counterfactual.gate.results import (
    GateReport,
    InterventionMetrics,
)
from nnunet_cfcl.counterfactual.gate.verdict import FEWEST_CASES, verdict_on
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.runs.watchdog import beat, watched


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
    metrics = tuple(_watched_metrics(judges, one, number) for number, one in enumerate(interventions))
    nothing_changed = composition(judges) if enough else None
    reconstructed = finite_or_none(mean_change(
        reconstructions_of(judges.generator, held), held.images, judges.std)) if enough else None
    return GateReport(
        metrics, tuple(verdict_on(one, nothing_changed, settings) for one in metrics), nothing_changed, reconstructed,
        {one.name: real_accuracy(judges, one) for one in judges.predictor.attributes},
        len(held), len(set(held.cases)), len(set(judges.training.cases)), asdict(settings), judges.seed)


def _watched_metrics(judges: Judges, intervention: Intervention, number: int) -> InterventionMetrics:
    beat()
    return intervention_metrics(judges, intervention, number)
