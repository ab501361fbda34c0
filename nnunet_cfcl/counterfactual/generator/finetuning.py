"""Counterfactual fine-tuning: a generator whose interventions do too little is taught by an attribute predictor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from nnunet_cfcl.counterfactual.gate.attribute_predictor import AttributePredictor
from nnunet_cfcl.counterfactual.generator.code_adversary import value_targets
from nnunet_cfcl.counterfactual.generator.data import Sample
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.hvae import Evidence
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask
from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining

#: Weight of the evidence at the start, and how fast it follows the violation of its bound.
FIRST_MULTIPLIER, MULTIPLIER_RATE = 10.0, 0.5
#: The bound is set by the mean evidence of the first steps, in which the generator has hardly changed yet.
STEPS_BEFORE = 20
#: How long the moving average of the evidence that is compared with it remembers: single batches vary by more.
MEMORY = 0.95


def finetuned_identity(task: GeneratorTask) -> dict[str, Any]:
    """The task's own and the settings of the fine-tuning."""
    chosen = task.settings.generator
    return {**task.identity, "finetuned": [
        chosen.finetune_epochs, chosen.finetune_lr, chosen.finetune_slack, task.settings.gate.predictor_steps]}


class CounterfactualFineTuning(GeneratorTraining):
    """Goes on with a generator so that a predictor takes its counterfactuals for what they should be.

    min E[-log p(pa* | x*)] subject to F(x, pa) <= c (Ribeiro et al. 2023, arXiv 2306.15764, section 3.3), F the
    negative evidence bound and c what it was before plus ``finetune_slack``; by the method of multipliers. Without the
    bound the generator would learn to please the predictor in whatever way is easiest.

    Args:
        task: that of the generator.
        generator: to begin with; it stays as it is.
        predictor: of all changed attributes, trained on the task's training cases; not the one that judges.
    """

    latest_name, final_name = "finetuning_latest.pth", "generator_finetuned.pth"
    log_folder, title = "finetuning", "generator fine-tuning"

    def __init__(self, task: GeneratorTask, generator: CounterfactualGenerator, predictor: AttributePredictor) -> None:
        super().__init__(replace(task, identity=finetuned_identity(task)))
        self.model.load_state_dict(generator.model.state_dict())
        self.average = AveragedModel(self.model, avg_fn=self._averaged)
        self.predictor = predictor.to(task.device)
        self.multiplier, self.bound = FIRST_MULTIPLIER, math.nan
        self._evidence, self._steps_seen = 0.0, 0

    def _schedule(self) -> tuple[int, float]:
        return self.settings.finetune_epochs, self.settings.finetune_lr

    def _beta(self, number: int) -> float:
        return self.settings.beta

    def step(self, batch: Sample, number: int) -> dict[str, float]:
        """See `GeneratorTraining.step`; afterwards the multiplier follows."""
        statistics = super().step(batch, number)
        # one step that was skipped, with an evidence beyond all bounds, would rule for long
        if not statistics["skipped"]:
            share = len(batch.image) / self.settings.images_per_step
            own = torch.tensor(share * statistics["negative_evidence"], device=self.task.device)
            self._follow(float(self.ranks.total(own)))
        return statistics

    def _loss(self, evidence: Evidence, sample: Sample, number: int) -> tuple[Tensor, dict[str, float]]:
        """The predictor's cross entropy on counterfactuals, and the evidence with the weight it needs."""
        free_energy, _ = super()._loss(evidence, sample, number)
        with self._autocast():
            after = self.model.decode(evidence.codes, sample.others)
        before = evidence.likelihood
        gain = torch.exp(after.log_scale - before.log_scale)
        counterfactual = self.scale.backward(after.mean + gain * (sample.image - before.mean))
        predicted = self._cross_entropy(counterfactual, sample.others)
        return (predicted + self.multiplier * free_energy,
                {"predictor": float(predicted.detach()), "multiplier": self.multiplier,
                 "negative_evidence": float(free_energy.detach())})

    def _cross_entropy(self, images: Tensor, parents: Tensor) -> Tensor:
        """Mean over the attributes; those that are unknown are left out."""
        found = self.predictor.log_probabilities(images)
        attributes = self.predictor.attributes
        targets = value_targets(parents, self.task.coding, attributes).split([len(a.values) for a in attributes], 1)
        parts = [-(found[attribute.name] * target).sum() / target.sum().clamp_min(1)
                 for attribute, target in zip(attributes, targets)]
        return torch.stack(parts).mean()

    def _follow(self, evidence: float) -> None:
        """Raise the multiplier while the negative evidence is beyond its bound, lower it else.

        Args:
            evidence: negative, in nats per voxel, the mean of a step's images on all ranks.
        """
        if self._steps_seen < STEPS_BEFORE:
            self._steps_seen += 1
            self._evidence += (evidence - self._evidence) / self._steps_seen
            self.bound = self._evidence + self.settings.finetune_slack
            return
        self._evidence = MEMORY * self._evidence + (1 - MEMORY) * evidence
        self.multiplier = max(0.0, self.multiplier + MULTIPLIER_RATE * (self._evidence - self.bound))

    def state(self) -> dict[str, Any]:
        """The training's state and that of the constraint."""
        return {**super().state(), "constraint": self._constraint()}

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore `state`."""
        super().load_state(content)
        self.multiplier, self.bound, self._evidence, self._steps_seen = content["constraint"]

    def _constraint(self) -> tuple[float, float, float, int]:
        return self.multiplier, self.bound, self._evidence, self._steps_seen
