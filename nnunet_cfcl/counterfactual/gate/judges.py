"""The gate's judges: networks trained on real images, and the held-out images that generators are judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate.attribute_predictor import (
    AttributePredictor,
    train_predictor,
)
from nnunet_cfcl.counterfactual.gate.cases import (
    JudgedGenerator,
    balanced_choice,
)
from nnunet_cfcl.counterfactual.gate.image_pairs import (
    channel_std,
)
from nnunet_cfcl.counterfactual.gate.small_segmenter import SmallSegmenter, train_segmenter
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.errors import listed
from nnunet_cfcl.runs.seeds import generator_for

#: Part of the keys of all random numbers of the gate, so that its networks differ from others of the same seed.
GATE_KEY = 0x67617465


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
