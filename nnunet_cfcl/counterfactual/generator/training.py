"""Phase 0: the training of the counterfactual generator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nnunet_cfcl.counterfactual.generator.adversaries import Adversaries
from nnunet_cfcl.counterfactual.generator.data import GeneratorDataset, Sample, draw_patches
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator, computes_in_bfloat16
from nnunet_cfcl.counterfactual.generator.hvae import HVAE, Evidence
from nnunet_cfcl.counterfactual.generator.progress import draw_samples, plot_generator_progress
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask
from nnunet_cfcl.errors import UserError, best_effort
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.runs.checkpoint import save_checkpoint
from nnunet_cfcl.runs.epochs import EpochLoop, Line
from nnunet_cfcl.runs.schedule import cosine, ramp
from nnunet_cfcl.runs.seeds import generator_for

#: Number of patches of the validation.
VALIDATION_PATCHES = 64
#: The learning rate at the end, as a share of the highest one.
FINAL_LR_SHARE = 0.02
#: Share of the training over which the weights of the adversaries' losses rise.
ADVERSARY_RAMP = 0.05
ADVERSARIES = ("code_adversary", "image_adversary")


class GeneratorTraining(EpochLoop[Sample]):
    """The training of a conditional hierarchical VAE with adversaries, see `EpochLoop`.

    Args:
        task: cases, attributes, sizes, settings, device and folder.
    """

    task: GeneratorTask
    title, shown, final_name = "generator training", "nll", "generator.pth"

    def __init__(self, task: GeneratorTask) -> None:
        self.settings = task.settings.generator
        epochs, self.peak_lr = self._schedule()
        super().__init__(task, epochs, self.settings.iterations_per_epoch, self.settings.images_per_step,
                         "generator.images_per_step")
        torch.manual_seed(task.settings.seed)
        self.model = HVAE(task.sizes).to(task.device)
        self.adversaries = Adversaries(task.sizes, task.coding, task.changed, self._parents()).to(task.device)
        for part in self.modules():
            self.ranks.broadcast_parameters(part)
        self.average = AveragedModel(self.model, avg_fn=self._averaged)
        # Ribeiro et al. 2023 use betas (0.9, 0.9): the likelihood's gradients change fast
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.peak_lr, betas=(0.9, 0.9),
                                           weight_decay=self.settings.weight_decay)
        self.adversary_optimizer = torch.optim.AdamW(
            self.adversaries.parameters(), lr=self.settings.adversary_lr, betas=(0.5, 0.9))
        self.scale = task.scale.to(task.device)
        self.data = GeneratorDataset(task.reader, task.cells, task.training, task.coding,
                                     task.interventions, self._patch_size, self.settings, task.settings.seed,
                                     self.total_steps)

    def _schedule(self) -> tuple[int, float]:
        """Number of epochs and highest learning rate."""
        return self.settings.epochs, self.settings.initial_lr

    def generator(self) -> CounterfactualGenerator:
        """The generator in its present state, with the averaged weights, which are not copied."""
        model = cast(HVAE, self.average.module)
        return CounterfactualGenerator(model, self.task.coding, self.task.scale, self.task.identity, self.task.device)

    # ---------------------------------------------------------------- a step

    def step(self, batch: Sample, number: int) -> dict[str, float]:
        """One step of the model and one of the adversaries on this rank's images; returns its statistics."""
        rate = self._rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for optimizer in (self.optimizer, self.adversary_optimizer):
            optimizer.zero_grad(set_to_none=True)
        statistics = self._backward(batch, number)
        self.ranks.sum_gradients(self.model.parameters(), ())
        self.ranks.sum_gradients(self.adversaries.parameters(), ())
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm))
        # an infinite bound clips nothing and returns the norm
        adversary_norm = float(nn.utils.clip_grad_norm_(self.adversaries.parameters(), math.inf))
        good = math.isfinite(norm + adversary_norm) and norm <= self.settings.skip_norm
        if good:
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.adversary_optimizer.step()
        return {**statistics, "learning_rate": rate, "gradient_norm": norm, "skipped": float(not good)}

    def _backward(self, batch: Sample, number: int) -> dict[str, float]:
        self.model.train()
        sample = Sample(*(part.to(self.task.device, non_blocking=True) for part in batch))
        sample = sample._replace(image=self.scale.forward(sample.image))
        noise = self.model.draw_noise(self._noise_generator(number), len(sample.image))
        totals: dict[str, float] = {}
        for start in range(0, len(sample.image), self.task.images_per_pass):
            rows = slice(start, start + self.task.images_per_pass)
            part = Sample(*(field[rows] for field in sample))
            share = len(part.image) / self.settings.images_per_step
            for key, value in self._pass(part, [one[rows] for one in noise], number, share).items():
                totals[key] = totals.get(key, 0.0) + value * len(part.image) / len(sample.image)
        return {**totals, "beta": self._beta(number)}

    def _pass(self, sample: Sample, noise: Sequence[Tensor], number: int, share: float) -> dict[str, float]:
        """Gradients of a micro-batch, weighted by its ``share`` of the step's images; returns its statistics."""
        with self._autocast():
            evidence = self.model(sample.image, sample.parents, noise)
        loss, found = self._loss(evidence, sample, number)
        found |= {"nll": float(evidence.nll.detach().mean()), **self._per_resolution(evidence.kl.detach())}
        weight = self._adversary_weight(number)
        if self.settings.invariance:
            with self._autocast():
                given_away, found["code_adversary"] = self.adversaries.hide(evidence.codes, sample.parents, share)
            loss = loss + self.settings.invariance * weight * given_away
        if self.settings.realism:
            with self._autocast():
                counterfactuals = self.model.decode(evidence.codes, sample.others).mean
                disbelief, found["image_adversary"] = self.adversaries.convince(
                    evidence.likelihood.mean, counterfactuals, sample.parents, sample.others, share)
            loss = loss + self.settings.realism * weight * disbelief
        (share * loss).backward()
        return found

    def _loss(self, evidence: Evidence, sample: Sample, number: int) -> tuple[Tensor, dict[str, float]]:
        """The negative evidence lower bound, and further statistics."""
        return evidence.nll.mean() + self._beta(number) * self._divergence(evidence), {}

    def _divergence(self, evidence: Evidence) -> Tensor:
        """KL divergence with free bits: the mean of a resolution over the images counts as ``free_bits`` at least."""
        return evidence.kl.mean(1).clamp_min(self.settings.free_bits).sum()

    def _per_resolution(self, kl: Tensor) -> dict[str, float]:
        means = kl.mean(1).tolist()
        levels = enumerate(zip(means, self.task.sizes.resolutions, strict=True))
        return {"kl": sum(means), **{f"kl_{level}": mean for level, (mean, one) in levels if one.stochastic}}

    def _beta(self, number: int) -> float:
        return self.settings.beta * ramp(number + 1, self.settings.beta_warmup_fraction * self.total_steps)

    def _adversary_weight(self, number: int) -> float:
        # an adversary that has not learned anything yet has nothing to teach
        return ramp(number, ADVERSARY_RAMP * self.total_steps)

    def _rate(self, number: int) -> float:
        """Linear warm-up times a cosine."""
        warm = ramp(number + 1, self.settings.warmup_steps)
        return self.peak_lr * warm * cosine(number, self.total_steps, end=FINAL_LR_SHARE)

    def _averaged(self, averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        """A young average forgets faster, or it would remember the initial weights for a thousand steps."""
        decay = min(self.settings.ema, (1 + float(count)) / (10 + float(count)))
        return torch.lerp(current, averaged, decay) if averaged.is_floating_point() else current

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=computes_in_bfloat16(self.task.device))

    def _noise_generator(self, number: int) -> torch.Generator:
        # torch.Generator is per device; the seed also keeps dropout reproducible
        seed = generator_for(self.task.settings.seed, number, self.ranks.rank, 2).initial_seed()
        torch.manual_seed(seed)
        return torch.Generator(self.task.device).manual_seed(seed)

    @property
    def _patch_size(self) -> tuple[int, ...]:
        return self.task.sizes.resolutions[0].shape

    def _parents(self) -> Tensor:
        """(N, coding.width) encoded attributes of all training cases."""
        return torch.stack([self.task.coding.encode(self.task.cells.get(case, {})) for case in self.task.training])

    # ---------------------------------------------------------------- an epoch

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Evidence of the validation cases under the averaged weights."""
        task, device = self.task, self.task.device
        patches = draw_patches(task.reader, task.cells, task.validation, self._patch_size,
                               min(VALIDATION_PATCHES, 4 * len(task.validation)), task.settings.seed)
        generator = self.generator()
        parts: dict[str, list[Tensor]] = {}
        # without a graph to keep, twice as many fit
        count = min(8, 2 * task.images_per_pass)
        for start in range(0, len(patches), count):
            rows = slice(start, start + count)
            images = generator.scale.forward(patches.images[rows].to(device))
            parents = patches.parents(task.coding)[rows].to(device)
            noise = generator.model.draw_noise(torch.Generator(device).manual_seed(start), len(images))
            with self._autocast():
                evidence = generator.model(images, parents, noise)
            parts.setdefault("validation_nll", []).append(evidence.nll)
            parts.setdefault("validation_kl", []).append(evidence.kl.sum(0))
        return {key: float(torch.cat(values).mean()) for key, values in parts.items()}

    def plot(self, lines: Sequence[Line], file: Path) -> None:
        """See `plot_generator_progress`."""
        plot_generator_progress(lines, file)

    def report(self, line: Line) -> None:
        """Log the evidence on training and validation cases and the losses of the adversaries."""
        self.task.log(
            f"{self.title.capitalize()} epoch {line['epoch']:.0f}: NLL {line['nll']:.3f} (validation "
            f"{line['validation_nll']:.3f}), KL {line['kl']:.3f} (validation {line['validation_kl']:.3f}) nats per "
            "voxel, "
            + "".join(f"{key.replace('_', ' ')} {line[key]:.2f} of guessing, " for key in ADVERSARIES if key in line)
            + f"{line['images_per_second']:.1f} images/s, {line['seconds']:.1f} s"
            + (f", {line['skipped']:.0%} of the steps skipped (gradients too large or not finite)"
               if line["skipped"] else ""))

    def end_epoch(self, epoch: int) -> None:
        """Draw samples, every few epochs and after the last one."""
        last = epoch + 1 == self.epochs
        if last or (epoch + 1) % self.settings.samples_every == 0:
            file = self.task.folder / self.log_folder / f"samples_epoch_{epoch + 1:04d}.png"
            with best_effort(file, self.task.log):
                draw_samples(self.generator(), self.task, file)

    def all_skipped(self, last: Line) -> tuple[str, str]:
        """See `EpochLoop.all_skipped`; the adversaries are the reason where the model's gradients are small enough."""
        if last["gradient_norm"] <= self.settings.skip_norm:
            return "no step had finite gradients of the adversaries", "generator.adversary_lr"
        return (f"no step had gradients of a norm below {self.settings.skip_norm:g} (last {last['gradient_norm']})",
                "generator.initial_lr")

    # ---------------------------------------------------------------- checkpoints

    def modules(self) -> Sequence[nn.Module]:
        """Model and adversaries."""
        return self.model, self.adversaries

    def state(self) -> dict[str, Any]:
        """Weights, their average, the adversaries and both optimisers."""
        return {key: part.state_dict() for key, part in self._parts().items()}

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore `state`."""
        for key, part in self._parts().items():
            part.load_state_dict(content[key])

    def _parts(self) -> dict[str, Any]:
        """Key in the checkpoint -> module or optimiser."""
        return {"model": self.model, "average": self.average, "adversaries": self.adversaries,
                "optimizer": self.optimizer, "adversary_optimizer": self.adversary_optimizer}

    def check_identity(self, content: Mapping[str, Any]) -> None:
        """See `EpochLoop.check_identity`."""
        if content["hash"] != digest(self.task.identity):
            raise UserError(f"{self.latest} was made with other settings, cases or another plan",
                            "delete this file to train anew")

    def save_final(self) -> None:
        """Write the generator, see `save_generator`."""
        save_generator(self.generator(), self.final)


def save_generator(generator: CounterfactualGenerator, file: Path) -> None:
    """Write the file that `CounterfactualGenerator.load` reads, atomically."""
    save_checkpoint({"generator": generator.state(), "hash": digest(generator.identity)}, file)
