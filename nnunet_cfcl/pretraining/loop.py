"""Phase 1: the pretraining of a network, or a part of it, with any objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.pretraining.data import PretrainingDataset, StepOrder, batches
from nnunet_cfcl.pretraining.gallery import plot_views
from nnunet_cfcl.pretraining.gradient_cache import backward_with_cache, check_norms
from nnunet_cfcl.pretraining.monitor import TITLES, collapse_warning, plot_progress
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.pretraining.render import Row, render_views
from nnunet_cfcl.runs.checkpoint import load_body, load_checkpoint, save_checkpoint
from nnunet_cfcl.runs.epoch_log import EpochLog, best_effort
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.runs.schedule import learning_rate
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.runs.watchdog import watched
from nnunet_cfcl.views import ViewGeometry, check_patch


@dataclass(frozen=True)
class PretrainingTask:
    """Everything the loop is told.

    Args:
        reader: the cases.
        source: the counterfactuals.
        objective: the method.
        geometry: patch size and spacing.
        settings: all settings.
        patches_per_pass: patches that memory holds with their graph.
        device: cpu or cuda.
        workers: data loading processes; 0 loads in this process.
        folder: where checkpoints, log and picture go.
        identity: what makes two pretrainings the same, JSON-ready; its digest is kept in the checkpoints.
        log: writes a line for the user.
        checkpoints: false: nothing is saved.
        compile: wraps the network, e.g. ``torch.compile``.
        ranks: the processes that share every step.
        ignore_label: label that says nothing about the voxel; None: there is none.
        track: takes every epoch's line of numbers, for experiment loggers.
    """

    reader: CaseReader
    source: CounterfactualSource
    objective: Objective
    geometry: ViewGeometry
    settings: Settings
    patches_per_pass: int
    device: torch.device
    workers: int
    folder: Path
    identity: Mapping[str, Any]
    log: Callable[[str], None]
    checkpoints: bool = True
    compile: Callable[[nn.Module], nn.Module] = field(default=lambda network: network)
    ranks: Ranks = Ranks()
    ignore_label: int | None = None
    track: Callable[[Mapping[str, float]], None] = field(default=lambda line: None)


class Pretraining:
    """The loop: `run` trains from the start or from ``checkpoint_latest.pth``, epoch by epoch.

    Args:
        network: the whole network, whose weights are kept.
        features: the part of it that is trained, (N, C, *patch) -> (N, width, ...), see `Objective.tap`.
        width: its output's channels.
        task: everything else.

    Raises:
        UserError: a patch too small for the views; a batch norm would need one pass for all images; fewer images than
            ranks.
    """

    def __init__(self, network: nn.Module, features: nn.Module, width: int, task: PretrainingTask) -> None:
        self.task, self.settings, self.ranks = task, task.settings.pretrain, task.ranks
        self.objective = task.objective
        check_patch(task.geometry, task.settings.views)
        self.images = self.ranks.images(self.settings.images_per_step)
        views = task.settings.counterfactual.count + 1
        self.patches_per_step = self.settings.images_per_step * views
        self.rows = [(image, view) for image in range(len(self.images)) for view in range(views)]
        several = self.patches_per_step > task.patches_per_pass or self.ranks.count > 1
        if not self.objective.separable and several:
            check_norms(network)
        torch.manual_seed(task.settings.seed)
        self.network = network
        self.model = self.objective.build_model(task.compile(features), width, self.settings).to(task.device)
        self.ranks.broadcast_parameters(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=self.settings.initial_lr, weight_decay=self.settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.device.type == "cuda")
        self.total_steps = self.settings.epochs * self.settings.iterations_per_epoch
        self.data = PretrainingDataset(
            task.reader, task.source, task.objective, task.geometry, task.settings, self.total_steps, task.ignore_label
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Decay would pull a learned temperature towards 1, so it is spared."""
        spared = {id(p) for p in self.model.loss_parameters()}
        groups = [{"params": [p for p in self.parameters if id(p) not in spared]}]
        alone = [p for p in self.parameters if id(p) in spared]
        return [*groups, {"params": alone, "weight_decay": 0.0}] if alone else groups

    @property
    def latest(self) -> Path:
        """Checkpoint of the last finished epoch."""
        return self.task.folder / "checkpoint_latest.pth"

    @property
    def final(self) -> Path:
        """Checkpoint of the finished pretraining, accepted by nnU-Net's ``-pretrained_weights``."""
        return self.task.folder / "checkpoint_final.pth"

    def run(self, resume: bool) -> None:
        """Train; with ``resume`` go on after the epoch of ``checkpoint_latest.pth``, if there is one. All of it is
        watched, see `runs.watchdog.watched`."""
        with watched("pretraining", self.task.log):
            self._run(resume)

    def _run(self, resume: bool) -> None:
        first_epoch = self._restore() if resume else 0
        log = EpochLog(self.task.folder if self._saves else None, first_epoch, plot_progress, self.task.log)
        if self._saves:
            self._plot_views()
        data = self.batches(first_epoch)
        self.model.train()
        for epoch in range(first_epoch, self.settings.epochs):
            started = time.perf_counter()
            steps = self._epoch(epoch, data)
            self.ranks.broadcast_parameters(self.model)  # processors of different kinds round differently
            images = len(steps) * self.settings.images_per_step
            line = log.end_epoch(epoch, steps, time.perf_counter() - started, images)
            if self.ranks.is_main:
                self._report(line)
                self.task.track(line)
            self._save(self.latest, epoch + 1)
        self._save(self.final, self.settings.epochs)
        if self._saves:
            self.latest.unlink(missing_ok=True)
        self.ranks.wait()

    def step(self, batch: Mapping[str, Any], number: int) -> dict[str, float]:
        """One optimiser step on this rank's collated images; returns its statistics."""
        rate = learning_rate(number, self.total_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(generator_for(self.task.settings.seed, number, self.ranks.rank).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        running = [buffer.clone() for buffer in self.model.buffers()]
        statistics = self.backward(batch)
        self.ranks.sum_gradients(self.parameters, self.model.loss_parameters())
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if not math.isfinite(norm):
            # the forward pass has moved the statistics of batch norms, which would stay NaN for good
            for buffer, before in zip(self.model.buffers(), running, strict=True):
                buffer.copy_(before)
        self.model.after_step((number + 1) / self.total_steps)
        return {**statistics, "learning_rate": rate, "gradient_norm": norm, "skipped": float(not math.isfinite(norm))}

    def backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """This rank's part of the gradients, in as many passes as memory asks for; returns loss and statistics."""
        chunk = self.task.patches_per_pass
        chunks = [self.rows[start : start + chunk] for start in range(0, len(self.rows), chunk)]
        return self._accumulate(batch, chunks) if self.objective.separable else self._contrast(batch, chunks)

    def _contrast(self, batch: Mapping[str, Any], chunks: Sequence[list[Row]]) -> dict[str, float]:
        """A loss of all embeddings of all ranks together."""
        statistics: dict[str, float] = {}
        count = self.settings.images_per_step
        drawn = {key: self.ranks.gather(value.to(self.task.device), count) for key, value in batch["drawn"].items()}

        def loss(embeddings: Tensor) -> Tensor:
            with self.ranks.sharing_blocks():
                value, found = self.objective.loss(self.model, self.ranks.gather(embeddings, count), drawn)
            statistics.update(found)
            return value

        value = backward_with_cache(
            lambda rows: self._encode(batch, rows), chunks, loss, self.task.device, self.scaler.scale
        )
        return {"loss": float(value), **statistics}

    def _accumulate(self, batch: Mapping[str, Any], chunks: Sequence[list[Row]]) -> dict[str, float]:
        """A loss that is a mean over the views."""
        total = torch.zeros((), device=self.task.device)
        for rows in chunks:
            value, _ = self.objective.loss(self.model, self._encode(batch, rows), {})
            share = value * (len(rows) / self.patches_per_step)
            self.scaler.scale(share).backward()
            total += share.detach()
        return {"loss": float(self.ranks.total(total))}

    def _encode(self, batch: Mapping[str, Any], rows: list[Row]) -> Tensor:
        views = self.render(batch, rows)
        inputs = self.objective.inputs(batch, rows, self.task.device)
        with torch.autocast("cuda") if self.task.device.type == "cuda" else nullcontext():
            outputs: Tensor = self.model(views, inputs)
        return outputs.float()

    @torch.no_grad()
    def render(self, batch: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
        """The views of ``rows``, see `render_views`."""
        task = self.task
        return render_views(batch, rows, task.source, task.geometry, task.settings.views, task.device)

    def batches(self, first_epoch: int) -> Iterator[Any]:
        """This rank's collated images, step by step."""
        steps = range(first_epoch * self.settings.iterations_per_epoch, self.total_steps)
        order = StepOrder(steps, self.settings.images_per_step, self.images)
        return batches(self.data, order, len(self.images), self.task.workers)

    def _plot_views(self) -> None:
        images = min(4, len(self.images))
        batch = default_collate([self.data[index] for index in range(images)])
        rows = [row for row in self.rows if row[0] < images]
        views = self.render(batch, rows).cpu().unflatten(0, (images, -1))
        others = "view" if self.task.source.name == "none" else "counterfactual"
        picture = self.task.folder / "views.png"
        with best_effort(picture, self.task.log):
            replace_atomically(picture, lambda file: plot_views(batch, views, file, others))

    def _epoch(self, epoch: int, data: Iterator[Any]) -> list[dict[str, float]]:
        length = self.settings.iterations_per_epoch
        steps = []
        # disable=None: the bar is drawn on a terminal only
        hidden = None if self.ranks.is_main else True
        with (
            watched(f"pretraining epoch {epoch}", self.task.log) as beat,
            tqdm(total=length, desc=f"pretraining {epoch + 1}/{self.settings.epochs}", disable=hidden) as bar,
        ):
            for number in range(epoch * length, (epoch + 1) * length):
                steps.append(self.step(next(data), number))
                beat()
                bar.set_postfix(loss=f"{steps[-1]['loss']:.3f}")
                bar.update()
        # a gradient scaler begins with a few skipped steps, whose loss is finite, until its scale is small enough
        searches = self.scaler.is_enabled() and self.scaler.get_scale() >= 1 and math.isfinite(steps[-1]["loss"])
        if all(step["skipped"] for step in steps) and not searches:
            raise UserError(
                f"pretraining epoch {epoch}: no step had finite gradients (loss {steps[-1]['loss']})",
                "look for extreme "
                "intensities with `nnunet_cfcl doctor --data`, or lower pretrain.initial_lr"
            )
        return steps

    def _report(self, line: Mapping[str, float]) -> None:
        told = {"alignment": ".3f", "uniformity": ".3f", "temperature": ".3f", "positives": ".1%"}
        self.task.log(
            f"Pretraining epoch {line['epoch']:.0f}: loss {line['loss']:.4f}, "
            + "".join(f"{TITLES[key]} {line[key]:{form}}, " for key, form in told.items() if key in line)
            + f"{line['images_per_second']:.1f} images/s, {line['seconds']:.1f} s"
            + (f", {line['skipped']:.0%} of the steps skipped (gradients not finite)" if line["skipped"] else "")
        )
        warning = collapse_warning(line)
        # a network that is still warming up embeds everything alike, which is no collapse
        if warning and line["epoch"] + 1 > self.settings.warmup_fraction * self.settings.epochs:
            self.task.log(warning)

    @property
    def _saves(self) -> bool:
        return self.task.checkpoints and self.ranks.is_main

    def _save(self, file: Path, epoch: int) -> None:
        if not self._saves:
            return
        content = {
            "network_weights": self.network.state_dict(),
            "model": self.model.additions(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.scaler.state_dict(),
            "epoch": epoch,
            "identity": dict(self.task.identity),
            "settings": self.task.settings.to_dict(),
            "hash": digest(self.task.identity),
        }
        save_checkpoint(content, file)

    def _restore(self) -> int:
        """The epoch to go on with, 0 without a checkpoint; only the first rank needs to see the file."""
        found = load_checkpoint(self.latest) if self.ranks.is_main and self.latest.exists() else None
        content = self.ranks.broadcast_object(found)
        if content is None:
            return 0
        check_same_identity(content["identity"], self.task.identity, self.latest)
        load_body(self.network, content["network_weights"], keep_heads=self.objective.tap != "segmentation")
        self.model.load_additions(content["model"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if content["grad_scaler_state"] and self.scaler.is_enabled():  # empty where the run was begun on a CPU
            self.scaler.load_state_dict(content["grad_scaler_state"])
        epoch = int(content["epoch"])
        if self.ranks.is_main:
            self.task.log(f"Pretraining goes on after epoch {epoch - 1} ({self.latest})")
        return epoch


def check_same_identity(found: Mapping[str, Any], expected: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on from a checkpoint of another pretraining.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    before, now = _flat(found), _flat(expected)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        values = [(key, _short(before.get(key)), _short(now.get(key))) for key in changed[:5]]
        differences = "; ".join(f"{key}: {old} then, {new} now" for key, old, new in values)
        raise UserError(
            f"{file} was made with other settings ({differences}): restore them to continue with --c, or start over "
            "without --c"
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
