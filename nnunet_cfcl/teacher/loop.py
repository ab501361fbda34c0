"""Phase 3: a student learns from labelled images and from a teacher's labels of the pool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import default_collate

from nnunet_cfcl.errors import UserError, best_effort
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.losses import pseudo_label_loss
from nnunet_cfcl.runs.checkpoint import save_checkpoint
from nnunet_cfcl.runs.epochs import EpochLoop, Line
from nnunet_cfcl.runs.scaled_step import lowers_its_scale, restore_scaler, scaled_step
from nnunet_cfcl.runs.schedule import ramp
from nnunet_cfcl.runs.seeds import generator_for, seed_everything
from nnunet_cfcl.teacher.data import STREAM, PoolDataset, teacher_views
from nnunet_cfcl.teacher.mixing import apply_boxes, draw_boxes
from nnunet_cfcl.teacher.monitor import plot_progress, plot_pseudo_labels
from nnunet_cfcl.teacher.pseudo_labels import (
    ClassShares,
    PseudoLabels,
    disagreement,
    from_target,
    pseudo_labels,
    shares,
    trusted,
)
from nnunet_cfcl.teacher.render import render_pool
from nnunet_cfcl.teacher.task import TeacherTask
from nnunet_cfcl.views import check_patch

#: nnU-Net's own maximal gradient norm and exponent of the learning rate's decay.
CLIP_NORM, POLY = 12.0, 0.9
#: Decays of the teacher's average, and the number of steps from which on the slow one is used.
FAST_DECAY, SLOW_DECAY, MANY_STEPS = 0.99, 0.999, 5000
#: Images in the picture of the pseudo-labels.
SHOWN = 4


class TeacherTraining(EpochLoop[Mapping[str, Any]]):
    """Semi-supervised training with a moving-average teacher (mean teacher, Tarvainen and Valpola 2017, arXiv
    1703.01780; FixMatch, arXiv 2001.07685), see `EpochLoop`.

    The teacher labels a weak view of a pool image; the student must reproduce the labels on a strong one, a
    counterfactual of it, mixed with boxes of other images. Both begin with the weights of ``student``.

    Args:
        student: network to train, compiled or not.
        plain: the same network without wrappers, whose weights are saved.
        optimizer: of the student's parameters; its learning rates are those at the beginning of phase 2.
        task: cases, batches, settings, device and folder.

    Raises:
        UserError: fewer images per step than ranks; a patch too small for the views.
    """

    task: TeacherTask
    title, shown = "phase 3", "loss"

    def __init__(self, student: nn.Module, plain: nn.Module, optimizer: Optimizer, task: TeacherTask) -> None:
        check_patch(task.geometry, teacher_views(task.settings))
        self.settings = task.settings.teacher
        super().__init__(task, task.epochs, task.iterations, task.images_per_step, "the plan's batch_size")
        self.student, self.plain, self.optimizer = student, plain, optimizer
        self.ranks.broadcast_parameters(plain)
        self.parameters = [p for p in plain.parameters() if p.requires_grad]
        self.rates = [group["lr"] for group in optimizer.param_groups]
        # buffers, such as running means, are copied
        self.average = AveragedModel(plain, avg_fn=None, multi_avg_fn=self._averaged)
        self.average.module.eval().requires_grad_(False)
        if not self.settings.rising_decay:
            self.average.n_averaged.fill_(1)  # at 0 the first update would copy the student
        self.teacher = task.compile(self.average.module)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.device.type == "cuda")
        self.shares = ClassShares(task.expected_shares, first=0 if task.regions else 1)
        self.data = PoolDataset(task.reader, task.groups, task.source, task.geometry, task.settings,
                                task.images_per_step, task.weak)
        # weight 0: nnU-Net's training goes on, the control of phase 3 in comparisons
        self.learns_pool = self.settings.weight > 0
        many = self.total_steps >= MANY_STEPS
        self.decay = self.settings.decay if self.settings.decay is not None else SLOW_DECAY if many else FAST_DECAY

    @property
    def result(self) -> nn.Module:
        """The network that the phase results in."""
        return self.average.module if self.settings.result == "teacher" else self.plain

    def _averaged(self, averaged: Any, current: Any, count: Any) -> None:
        """Move the averages, see ``teacher.rising_decay``."""
        decay = min(1 - 1 / (float(count) + 1), self.decay) if self.settings.rising_decay else self.decay
        torch._foreach_lerp_(averaged, current, 1 - decay)

    # ---------------------------------------------------------------- a step

    def step(self, batch: Mapping[str, Any], number: int) -> dict[str, float]:
        """One optimiser step on a labelled batch and this rank's collated images of the pool."""
        # nnU-Net's loader draws from the global generators
        seed_everything(self.task.settings.seed, STREAM, number, self.ranks.rank)
        rate = (1 - number / self.total_steps) ** POLY * self.settings.lr_factor
        for group, first in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * first
        self.optimizer.zero_grad(set_to_none=True)
        labelled = self._labelled()
        found = {"loss": self._learn_labels(labelled)}
        weight = ramp(number + 1, self.settings.ramp_fraction * self.total_steps, self.settings.weight)
        if self.learns_pool:
            found |= self._learn_pool(batch, labelled, number, weight)
        self.ranks.sum_gradients(self.parameters, ())
        norm = scaled_step(self.optimizer, self.scaler, self.parameters, CLIP_NORM)
        if math.isfinite(norm):
            self.average.update_parameters(self.plain)
        means = self._means(found)
        if self.learns_pool:
            self.shares.update(torch.tensor([means[f"share_{name}"] for name in self.task.heads]))
        return {**means, "weight": weight, "learning_rate": self.optimizer.param_groups[0]["lr"],
                "gradient_norm": norm, "skipped": float(not math.isfinite(norm))}

    def _labelled(self) -> tuple[Tensor, Any]:
        """Images and target of the next labelled batch, on the device."""
        batch = next(self.task.labelled)
        images, target = batch["data"], batch["target"]
        device = self.task.device
        on_device = [one.to(device, non_blocking=True) for one in target] if isinstance(target, list) \
            else target.to(device, non_blocking=True)
        return images.to(device, non_blocking=True), on_device

    def _learn_labels(self, labelled: tuple[Tensor, Any]) -> Tensor:
        images, target = labelled
        with self._autocast():
            loss = self.task.segmentation_loss(self.student(images), target)
        self.scaler.scale(loss / self.ranks.count).backward()
        return loss.detach()

    def _learn_pool(
        self, batch: Mapping[str, Any], labelled: tuple[Tensor, Any], number: int, weight: float
    ) -> dict[str, Tensor]:
        """Gradients of the loss on the pool, micro-batch by micro-batch; returns its means."""
        weak, strong = self.render(batch)
        pseudo = self.label(weak)
        mixed, target, own = self._mix(strong, pseudo, labelled, number)
        count = self.settings.patches_per_pass or len(strong)
        totals: dict[str, Tensor] = {}
        for start in range(0, len(mixed), count):
            part = slice(start, start + count)
            share = len(mixed[part]) / len(mixed)
            with self._autocast():
                outputs = self.student(mixed[part])
            outputs = _levels(outputs)
            loss = self._pool_loss(outputs, PseudoLabels(target.labels[part], target.known[part]))
            self.scaler.scale(weight * share * loss / self.ranks.count).backward()
            differing = disagreement(outputs[0].detach(), PseudoLabels(pseudo.labels[part], own[part]),
                                     self.task.regions)
            for key, value in (("pool_loss", loss.detach()), ("disagreement", differing)):
                totals[key] = totals.get(key, 0) + share * value
        return {**totals, **self._confidence(batch, pseudo)}

    def _pool_loss(self, outputs: Sequence[Tensor], pseudo: PseudoLabels) -> Tensor:
        """The loss over the outputs of deep supervision, with nnU-Net's weights; classes that grow weigh less."""
        weights, trust = self.task.output_weights[: len(outputs)], self.shares.trust.to(outputs[0])
        parts = []
        for output, weight in zip(outputs, weights):
            if weight:
                labels, known = pseudo.at(output.shape[2:])
                confidence = trusted(labels, known, trust, self.task.regions)
                parts.append(weight * pseudo_label_loss(output, labels, confidence, self.task.regions))
        return torch.stack(parts).sum() / sum(weights)

    def _mix(
        self, strong: Tensor, pseudo: PseudoLabels, labelled: tuple[Tensor, Any], number: int
    ) -> tuple[Tensor, PseudoLabels, Tensor]:
        """Exchange boxes between the rank's pool images, and paste boxes of its labelled ones.

        Returns:
            Mixed images, their labels, and the mask of the known voxels that are still the images' own.
        """
        images, target = labelled
        donors, donor_labels = strong, pseudo
        if self.settings.paste_labelled:
            finest = target[0] if isinstance(target, list) else target
            manual = from_target(finest, self.task.ignore_label, self.task.regions)
            donors = torch.cat([strong, images.to(strong)])
            donor_labels = PseudoLabels(*(torch.cat(pair) for pair in zip(pseudo, manual)))
        generator = generator_for(self.task.settings.seed, STREAM, number, self.images_per_step, self.ranks.rank)
        boxes = draw_boxes(generator, len(strong), len(donors), strong.shape[2:], self.settings.mix_probability,
                           self.settings.mix_size)
        mixed, target = apply_boxes(strong, pseudo, boxes, donors, donor_labels)
        return mixed, target, pseudo.known & ~boxes.mask(strong.shape[2:]).to(strong.device)

    def render(self, batch: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Weak and strong views of collated images, see `render_pool`."""
        task = self.task
        return render_pool(batch, task.source, task.geometry, task.settings, task.device)

    @torch.no_grad()
    def label(self, weak: Sequence[Tensor]) -> PseudoLabels:
        """The teacher's labels of weak views."""
        count = self.settings.patches_per_pass or len(weak[0])
        with self._autocast():
            logits = [torch.cat([_levels(self.teacher(part))[0] for part in one.split(count)]) for one in weak]
        return pseudo_labels(logits, self.settings.confidence, self.task.regions)

    def _confidence(self, batch: Mapping[str, Any], pseudo: PseudoLabels) -> dict[str, Tensor]:
        """Share of known voxels, of every scanner too (NaN: none in the step), and of each class among them."""
        known = pseudo.known.flatten(1).float().mean(1)
        groups = batch["group"].to(known.device)
        names = self.task.groups if len(self.task.groups) > 1 else ()
        per_group = {f"known_{name}": known[groups == index].mean() for index, name in enumerate(names)}
        found = shares(pseudo.labels, pseudo.known, len(self.task.heads), self.task.regions)
        return {"known": known.mean(), **per_group,
                **{f"share_{name}": found[index] for index, name in enumerate(self.task.heads)}}

    def _means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the ranks that have a value; one transfer for all of them."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        both = torch.stack([stacked.nan_to_num(), stacked.isfinite().double()])
        total, count = self.ranks.total(both).tolist()
        return {key: one / number if number else math.nan for key, one, number in zip(values, total, count)}

    def _autocast(self) -> Any:
        return torch.autocast("cuda") if self.task.device.type == "cuda" else nullcontext()

    # ---------------------------------------------------------------- an epoch

    def begin(self) -> None:
        """Draw pseudo-labels of a few images."""
        self.student.train()
        if self.saves and self.learns_pool:
            self._plot_pseudo_labels()

    def batches(self, first_epoch: int) -> Iterator[Mapping[str, Any]]:
        """See `EpochLoop.batches`; empty ones where the pool is not learned from."""
        return super().batches(first_epoch) if self.learns_pool else repeat({})

    def _plot_pseudo_labels(self) -> None:
        images = min(SHOWN, len(self.images))
        batch = default_collate([self.data[index] for index in range(images)])
        weak, strong = self.render(batch)
        pseudo, picture = self.label(weak), self.task.folder / "pseudo_labels.png"
        with best_effort(picture, self.task.log):
            replace_atomically(picture, lambda file: plot_pseudo_labels(weak[0], strong, pseudo, file))

    def validate(self) -> dict[str, float]:
        """Pseudo Dice of the result so far."""
        if self.task.validate is None:
            return {}
        found = {"dice": self.task.validate(self.result)}
        self.student.train()
        return found

    def plot(self, lines: Sequence[Line], file: Path) -> None:
        """See `plot_progress`."""
        plot_progress(lines, file)

    def report(self, line: Line) -> None:
        """Log losses, confidence and disagreement, and warn of classes beyond their bounds."""
        pool = (f", on the pool {line['pool_loss']:.4f} (weight {line['weight']:.2f}), {line['known']:.1%} of its "
                f"voxels labelled, {line['disagreement']:.1%} of the foreground labelled otherwise by the student"
                if "pool_loss" in line else "")
        dice = f", pseudo Dice {line['dice']:.4f}" if "dice" in line else ""
        self.task.log(
            f"Phase 3 epoch {line['epoch']:.0f}: loss {line['loss']:.4f}{pool}{dice}, {line['seconds']:.1f} s")
        for index, ratio in self.shares.outside():
            self.task.log(
                f"WARNING: the teacher finds {ratio:.2g} times as much '{self.task.heads[index]}' in the pool as the "
                f"manual labels have{', so that these labels weigh less' if ratio > 1 else ''}. Unless the patients "
                "of the pool differ that much, the teacher is wrong, and phase 2 needs a better model")
        self.task.track(line)

    def all_skipped(self, last: Line) -> tuple[str, str] | None:
        """See `EpochLoop.all_skipped`."""
        if lowers_its_scale(self.scaler, last["loss"]):
            return None
        return f"no step had finite gradients (loss {last['loss']})", "teacher.lr_factor"

    # ---------------------------------------------------------------- checkpoints

    def modules(self) -> Sequence[nn.Module]:
        """Student and teacher."""
        return self.plain, self.average.module

    def state(self) -> dict[str, Any]:
        """Student, teacher, optimiser, and the classes' shares."""
        return {
            "student": self.plain.state_dict(), "teacher": self.average.state_dict(),
            "optimizer_state": self.optimizer.state_dict(), "grad_scaler_state": self.scaler.state_dict(),
            "shares": self.shares.found, "settings": self.task.settings.to_dict(),
        }

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore `state`."""
        self.plain.load_state_dict(content["student"])
        self.average.load_state_dict(content["teacher"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        self.shares.found = content["shares"]
        restore_scaler(self.scaler, content["grad_scaler_state"])

    def check_identity(self, content: Mapping[str, Any]) -> None:
        """Reject the checkpoint of another phase 3.

        Raises:
            UserError: its identity is another one.
        """
        if content["hash"] != digest(self.task.identity):
            raise UserError(f"{self.latest} was made with other settings, cases or weights of phase 2",
                            "delete it and start again with --c")

    def save_final(self) -> None:
        """Write the resulting weights and the identity."""
        identity = dict(self.task.identity)
        save_checkpoint({"network_weights": self.result.state_dict(), "identity": identity, "hash": digest(identity)},
                        self.final)


def _levels(outputs: Any) -> Sequence[Tensor]:
    """The outputs of a network with or without deep supervision, from full to lowest resolution."""
    return outputs if isinstance(outputs, (list, tuple)) else [outputs]
