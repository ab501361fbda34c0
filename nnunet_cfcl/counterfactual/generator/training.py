"""Phase 0: the training of the counterfactual generator."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.generator.adversaries import Adversaries
from nnunet_cfcl.counterfactual.generator.data import Cells, GeneratorDataset, Sample, batches, draw_patches
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator, IntensityScale, computes_in_bfloat16
from nnunet_cfcl.counterfactual.generator.hvae import HVAE, Evidence, HVAESizes
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.progress import draw_samples, plot_generator_progress
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.runs.checkpoint import load_checkpoint, save_checkpoint
from nnunet_cfcl.runs.epoch_log import EpochLog, best_effort
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.runs.watchdog import watched

#: Patches of the validation.
VALIDATION_PATCHES = 64
ADVERSARIES = ("code_adversary", "image_adversary")


@dataclass(frozen=True)
class GeneratorTask:
    """Everything the training is told.

    Attributes:
        reader: the cases.
        cells: case -> attribute -> value.
        training, validation: cases, no patient in both.
        coding: of the attributes.
        interventions: what will be changed.
        scale: of the intensities.
        sizes: of the model.
        images_per_pass: images that memory holds with their graph.
        settings: all settings.
        spacing: (D,) in mm, for the pictures.
        device: cpu or cuda.
        workers: data loading processes; 0 loads in this process.
        folder: where checkpoints, log and pictures go.
        identity: what makes two generators the same, JSON-ready.
        log: writes a line for the user.
        ranks: the processes that share every step.
    """

    reader: CaseReader
    cells: Mapping[str, Cells]
    training: Sequence[str]
    validation: Sequence[str]
    coding: AttributeCoding
    interventions: Sequence[Intervention]
    scale: IntensityScale
    sizes: HVAESizes
    images_per_pass: int
    settings: Settings
    spacing: Sequence[float]
    device: torch.device
    workers: int
    folder: Path
    identity: Mapping[str, Any]
    log: Callable[[str], None]
    ranks: Ranks = Ranks()

    @property
    def changed(self) -> list[Attribute]:
        """The attributes that some intervention changes, each once."""
        return list(dict.fromkeys(attribute for one in self.interventions for attribute in one.attributes))


class GeneratorTraining:
    """The loop: `run` trains from the start or from the checkpoint of the last epoch, epoch by epoch.

    Args:
        task: everything.
    """

    #: Names of the files in the task's folder, and how the log calls it.
    latest_name, final_name = "checkpoint_latest.pth", "generator.pth"
    log_folder, title = ".", "generator"

    def __init__(self, task: GeneratorTask) -> None:
        self.task, self.settings, self.ranks = task, task.settings.generator, task.ranks
        self.epochs, self.peak_lr = self._schedule()
        torch.manual_seed(task.settings.seed)
        self.model = HVAE(task.sizes).to(task.device)
        self.adversaries = Adversaries(task.sizes, task.coding, task.changed, self._parents()).to(task.device)
        for part in (self.model, self.adversaries):
            self.ranks.broadcast_parameters(part)
        self.average = AveragedModel(self.model, avg_fn=self._averaged)
        # Ribeiro et al. 2023 use betas (0.9, 0.9): the likelihood's gradients change fast
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.peak_lr, betas=(0.9, 0.9),
                                           weight_decay=self.settings.weight_decay)
        self.adversary_optimizer = torch.optim.AdamW(
            self.adversaries.parameters(), lr=self.settings.adversary_lr, betas=(0.5, 0.9))
        self.total_steps = self.epochs * self.settings.iterations_per_epoch
        self.scale = task.scale.to(task.device)
        self.images = self.ranks.images(self.settings.images_per_step, setting="generator.images_per_step")
        self.data = GeneratorDataset(task.reader, task.cells, task.training, task.coding,
                                     task.interventions, self._patch_size, self.settings, task.settings.seed,
                                     self.total_steps)

    def _schedule(self) -> tuple[int, float]:
        """Epochs, and the highest learning rate."""
        return self.settings.epochs, self.settings.initial_lr

    @property
    def latest(self) -> Path:
        """Checkpoint of the last finished epoch."""
        return self.task.folder / self.latest_name

    @property
    def final(self) -> Path:
        """The finished generator."""
        return self.final_in(self.task.folder)

    @classmethod
    def final_in(cls, folder: Path) -> Path:
        """The file of the finished generator in a task's folder."""
        return folder / cls.final_name

    def run(self, resume: bool) -> CounterfactualGenerator:
        """Train; with ``resume`` go on after the epoch of `latest`, if there is one. All of it is watched, see
        `runs.watchdog.watched`."""
        with watched(f"{self.title} training", self.task.log):
            return self._run(resume)

    def _run(self, resume: bool) -> CounterfactualGenerator:
        first = self._restore() if resume else 0
        log = EpochLog(self.task.folder / self.log_folder if self.ranks.is_main else None, first,
                       plot_generator_progress, self.task.log)
        data = self._batches(first)
        for epoch in range(first, self.epochs):
            started = time.perf_counter()
            steps = self._epoch(epoch, data)
            for part in (self.model, self.adversaries):
                self.ranks.broadcast_parameters(part)  # processors of different kinds round differently
            if self.ranks.is_main:
                images = len(steps) * self.settings.images_per_step
                line = log.end_epoch(epoch, steps, time.perf_counter() - started, images, self._validate())
                # what is reported is not lost by a kill
                save_checkpoint(self._state(epoch + 1), self.latest)
                self._report(line)
                self._draw_samples(epoch)
        return self._finish()

    def step(self, batch: Sample, number: int) -> dict[str, float]:
        """One step of the model and one of the adversary on this rank's images; returns its statistics."""
        rate = self._rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for optimizer in (self.optimizer, self.adversary_optimizer):
            optimizer.zero_grad(set_to_none=True)
        statistics = self._backward(batch, number)
        self.ranks.sum_gradients(self.model.parameters(), ())
        self.ranks.sum_gradients(self.adversaries.parameters(), ())
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm))
        # without a bound nothing is clipped: only what is not finite is looked for
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
        """Gradients of ``share`` of the step's images, which are as the model sees them."""
        with self._autocast():
            evidence = self.model(sample.image, sample.parents, noise)
        loss, found = self._loss(evidence, sample, number)
        found |= {"nll": float(evidence.nll.detach().mean()), **self._per_resolution(evidence.kl.detach())}
        ramp = self._ramp(number)
        if self.settings.invariance:
            with self._autocast():
                given_away, found["code_adversary"] = self.adversaries.hide(evidence.codes, sample.parents, share)
            loss = loss + self.settings.invariance * ramp * given_away
        if self.settings.realism:
            with self._autocast():
                counterfactuals = self.model.decode(evidence.codes, sample.others).mean
                disbelief, found["image_adversary"] = self.adversaries.convince(
                    evidence.likelihood.mean, counterfactuals, sample.parents, sample.others, share)
            loss = loss + self.settings.realism * ramp * disbelief
        (share * loss).backward()
        return found

    def _loss(self, evidence: Evidence, sample: Sample, number: int) -> tuple[Tensor, dict[str, float]]:
        """The negative evidence lower bound, and numbers for the log."""
        return evidence.nll.mean() + self._beta(number) * self._divergence(evidence), {}

    def _divergence(self, evidence: Evidence) -> Tensor:
        """KL with free bits: a resolution's mean over the images counts from ``free_bits`` on."""
        return evidence.kl.mean(1).clamp_min(self.settings.free_bits).sum()

    def _per_resolution(self, kl: Tensor) -> dict[str, float]:
        means = kl.mean(1).tolist()
        levels = enumerate(zip(means, self.task.sizes.resolutions, strict=True))
        return {"kl": sum(means), **{f"kl_{level}": mean for level, (mean, one) in levels if one.stochastic}}

    def _beta(self, number: int) -> float:
        rising = self.settings.beta_warmup_fraction * self.total_steps
        return self.settings.beta * min(1.0, (number + 1) / max(1.0, rising))

    def _ramp(self, number: int) -> float:
        # there is nothing to hide before the adversary has learned to look
        return min(1.0, number / max(1.0, 0.05 * self.total_steps))

    def _rate(self, number: int) -> float:
        """Linear warm-up, then cosine to a fiftieth."""
        warm = min(1.0, (number + 1) / max(1, self.settings.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * number / self.total_steps))
        return self.peak_lr * warm * (0.02 + 0.98 * cosine)

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
        """(N, coding.width) of all training cases."""
        return torch.stack([self.task.coding.encode(self.task.cells.get(case, {})) for case in self.task.training])

    def _batches(self, first_epoch: int) -> Iterator[Sample]:
        steps = range(first_epoch * self.settings.iterations_per_epoch, self.total_steps)
        indices = [step * self.settings.images_per_step + image for step in steps for image in self.images]
        return batches(self.data, indices, len(self.images), self.task.workers)

    def _epoch(self, epoch: int, data: Iterator[Sample]) -> list[dict[str, float]]:
        length, steps = self.settings.iterations_per_epoch, []
        hidden = None if self.ranks.is_main else True  # None: the bar is drawn on a terminal only
        with (
            watched(f"{self.title} epoch {epoch}", self.task.log) as beat,
            tqdm(total=length, desc=f"{self.title} {epoch + 1}/{self.epochs}", disable=hidden) as bar,
        ):
            for number in range(epoch * length, (epoch + 1) * length):
                steps.append(self.step(next(data), number))
                beat()
                bar.set_postfix(nll=f"{steps[-1]['nll']:.3f}")
                bar.update()
        if all(step["skipped"] for step in steps):
            if steps[-1]["gradient_norm"] <= self.settings.skip_norm:
                raise UserError(
                    f"{self.title} epoch {epoch}: no step was done, the gradients of the adversaries are not finite",
                    "look for extreme intensities with `nnunet_cfcl doctor --data`, or lower generator.adversary_lr")
            raise UserError(
                f"{self.title} epoch {epoch}: no step had gradients of a norm below {self.settings.skip_norm:g} (last "
                f"{steps[-1]['gradient_norm']})", "look for extreme intensities with `nnunet_cfcl doctor --data`, or "
                "lower generator.initial_lr")
        return steps

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """The evidence of the validation cases, by the averaged weights."""
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

    def generator(self) -> CounterfactualGenerator:
        """The generator as it is now, with the averaged weights; they are not copied."""
        model = cast(HVAE, self.average.module)
        return CounterfactualGenerator(model, self.task.coding, self.task.scale, self.task.identity, self.task.device)

    def _report(self, line: Mapping[str, float]) -> None:
        self.task.log(
            f"{self.title.capitalize()} epoch {line['epoch']:.0f}: NLL {line['nll']:.3f} (validation "
            f"{line['validation_nll']:.3f}), KL {line['kl']:.3f} (validation {line['validation_kl']:.3f}) nats per "
            "voxel, "
            + "".join(f"{key.replace('_', ' ')} {line[key]:.2f} of guessing, " for key in ADVERSARIES if key in line)
            + f"{line['images_per_second']:.1f} images/s, {line['seconds']:.1f} s"
            + (f", {line['skipped']:.0%} of the steps skipped (gradients too large or not finite)"
               if line["skipped"] else ""))

    def _draw_samples(self, epoch: int) -> None:
        last = epoch + 1 == self.epochs
        if last or (epoch + 1) % self.settings.samples_every == 0:
            file = self.task.folder / self.log_folder / f"samples_epoch_{epoch + 1:04d}.png"
            with best_effort(file, self.task.log):
                draw_samples(self.generator(), self.task, file)

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "adversaries": self.adversaries.state_dict(), "optimizer": self.optimizer.state_dict(),
            "adversary_optimizer": self.adversary_optimizer.state_dict(), "epoch": epoch,
            "identity": dict(self.task.identity), "hash": digest(self.task.identity),
        }

    def _restore(self) -> int:
        """The epoch to go on with, 0 without a checkpoint; only the first rank needs to see the file."""
        found = load_checkpoint(self.latest) if self.ranks.is_main and self.latest.exists() else None
        content = self.ranks.broadcast_object(found)
        if content is None:
            return 0
        if content["hash"] != digest(self.task.identity):
            raise UserError(f"{self.latest} was made with other settings, cases or another plan", "delete this file to "
                            "train anew")
        self._load(content)
        if self.ranks.is_main:
            self.task.log(f"The generator's training goes on after epoch {content['epoch'] - 1} ({self.latest})")
        return int(content["epoch"])

    def _load(self, content: dict[str, Any]) -> None:
        """What `_state` kept."""
        for part, key in ((self.model, "model"), (self.average, "average"), (self.adversaries, "adversaries"),
                          (self.optimizer, "optimizer"), (self.adversary_optimizer, "adversary_optimizer")):
            part.load_state_dict(content[key])

    def _finish(self) -> CounterfactualGenerator:
        generator = self.generator()
        if self.ranks.is_main:
            save_generator(generator, self.final)
            self.latest.unlink(missing_ok=True)
        self.ranks.wait()
        return generator


def save_generator(generator: CounterfactualGenerator, file: Path) -> None:
    """The file that `CounterfactualGenerator.load` reads, atomically."""
    save_checkpoint({"generator": generator.state(), "hash": digest(generator.identity)}, file)
