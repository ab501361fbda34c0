"""Counterfactual fine-tuning of a generator by an attribute predictor, for interventions that change too little."""

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

#: Initial weight of the evidence, and its rate of change per nat of violation of the bound.
FIRST_MULTIPLIER, MULTIPLIER_RATE = 10.0, 0.5
#: Number of first steps whose mean evidence sets the bound: the generator has hardly changed in them.
STEPS_BEFORE = 20
#: Decay of the moving average of the evidence, which is compared with the bound; single batches vary by more.
MEMORY = 0.95


def finetuned_identity(task: GeneratorTask) -> dict[str, Any]:
    """Identity of the task and the settings of the fine-tuning."""
    chosen = task.settings.generator
    return {**task.identity, "finetuned": [
        chosen.finetune_epochs, chosen.finetune_lr, chosen.finetune_slack, task.settings.gate.predictor_steps]}


class CounterfactualFineTuning(GeneratorTraining):
    """Fine-tunes a generator so that an attribute predictor recognises the intervention in its counterfactuals.

    min E[-log p(pa* | x*)] subject to F(x, pa) <= c (Ribeiro et al. 2023, arXiv 2306.15764, section 3.3), by the method
    of multipliers. F is the negative evidence lower bound, c its value before the fine-tuning plus ``finetune_slack``.
    Without the constraint the generator would learn adversarial examples of the predictor.

    Args:
        task: task of the generator's own training.
        generator: the generator to start from, which is not changed.
        predictor: predictor of all changed attributes, trained on the task's training cases; not the gate's.
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
        """See `GeneratorTraining.step`; updates the multiplier afterwards."""
        statistics = super().step(batch, number)
        # the extreme evidence of a skipped step would dominate the moving average for long
        if not statistics["skipped"]:
            share = len(batch.image) / self.settings.images_per_step
            own = torch.tensor(share * statistics["negative_evidence"], device=self.task.device)
            self._follow(float(self.ranks.total(own)))
        return statistics

    def _loss(self, evidence: Evidence, sample: Sample, number: int) -> tuple[Tensor, dict[str, float]]:
        """The predictor's cross entropy on counterfactuals plus the negative evidence times the multiplier."""
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
        """Mean over the attributes; unknown values are left out."""
        found = self.predictor.log_probabilities(images)
        attributes = self.predictor.attributes
        targets = value_targets(parents, self.task.coding, attributes).split([len(a.values) for a in attributes], 1)
        parts = [-(found[attribute.name] * target).sum() / target.sum().clamp_min(1)
                 for attribute, target in zip(attributes, targets)]
        return torch.stack(parts).mean()

    def _follow(self, evidence: float) -> None:
        """Raise the multiplier while the negative evidence is above its bound, lower it otherwise.

        Args:
            evidence: negative evidence in nats per voxel, mean over a step's images on all ranks.
        """
        if self._steps_seen < STEPS_BEFORE:
            self._steps_seen += 1
            self._evidence += (evidence - self._evidence) / self._steps_seen
            self.bound = self._evidence + self.settings.finetune_slack
            return
        self._evidence = MEMORY * self._evidence + (1 - MEMORY) * evidence
        self.multiplier = max(0.0, self.multiplier + MULTIPLIER_RATE * (self._evidence - self.bound))

    def state(self) -> dict[str, Any]:
        """State of the training and of the constraint."""
        return {**super().state(), "constraint": self._constraint()}

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore `state`."""
        super().load_state(content)
        self.multiplier, self.bound, self._evidence, self._steps_seen = content["constraint"]

    def _constraint(self) -> tuple[float, float, float, int]:
        return self.multiplier, self.bound, self._evidence, self._steps_seen
