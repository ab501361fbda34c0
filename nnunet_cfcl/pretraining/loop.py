"""Phase 1: contrastive pretraining of a network that returns its last decoder map."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from nnunet_cfcl.config import Settings, digest
from nnunet_cfcl.counterfactual.source import CaseReader, CounterfactualSource
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining.checkpoint import load_body, load_checkpoint, save_checkpoint
from nnunet_cfcl.pretraining.data import PretrainingDataset, batches, generator_for
from nnunet_cfcl.pretraining.dual_view import Objective
from nnunet_cfcl.pretraining.gallery import plot_views
from nnunet_cfcl.pretraining.gradient_cache import backward_with_cache, check_norms
from nnunet_cfcl.pretraining.monitor import Monitor, collapse_warning
from nnunet_cfcl.pretraining.pixel_encoder import PixelEncoder
from nnunet_cfcl.pretraining.render import Row, render_views
from nnunet_cfcl.pretraining.schedule import learning_rate
from nnunet_cfcl.views import ViewGeometry, check_patch


@dataclass(frozen=True)
class PretrainingTask:
    """Everything the loop is told.

    Args:
        reader: the cases.
        source: the counterfactuals.
        objective: points and loss.
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


class Pretraining:
    """The loop: `run` trains from the start or from ``checkpoint_latest.pth``, epoch by epoch.

    Args:
        network: returns a feature map (N, F, *patch) for (N, C, *patch).
        feature_width: F.
        task: everything else.

    Raises:
        UserError: the patch is too small for the views; a batch norm would need one pass for all images.
    """

    def __init__(self, network: nn.Module, feature_width: int, task: PretrainingTask) -> None:
        self.task, self.settings = task, task.settings.pretrain
        check_patch(task.geometry, task.settings.views)
        self.rows = _rows(self.settings.images_per_step, task.settings.counterfactual.count + 1)
        if len(self.rows) > task.patches_per_pass:
            check_norms(network)
        torch.manual_seed(task.settings.seed)
        self.network = network
        compiled = task.compile(network)
        self.encoder = PixelEncoder(
            compiled, feature_width, self.settings.projection_hidden, self.settings.projection_dim
        ).to(task.device)
        self.parameters = [*_trained(network), *self.encoder.head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.initial_lr, weight_decay=self.settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.device.type == "cuda")
        self.total_steps = self.settings.epochs * self.settings.iterations_per_epoch
        self.data = PretrainingDataset(
            task.reader, task.source, task.objective, task.geometry, task.settings, self.total_steps
        )

    @property
    def latest(self) -> Path:
        """Checkpoint of the last finished epoch."""
        return self.task.folder / "checkpoint_latest.pth"

    @property
    def final(self) -> Path:
        """Checkpoint of the finished pretraining, accepted by nnU-Net's ``-pretrained_weights``."""
        return self.task.folder / "checkpoint_final.pth"

    def run(self, resume: bool) -> None:
        """Train; with ``resume`` go on after the epoch of ``checkpoint_latest.pth``, if there is one."""
        first_epoch = self._restore() if resume and self.latest.exists() else 0
        self.task.folder.mkdir(parents=True, exist_ok=True)
        monitor = Monitor(self.task.folder, first_epoch)
        self._plot_views()
        data = self._batches(first_epoch)
        self.network.train()
        for epoch in range(first_epoch, self.settings.epochs):
            started = time.perf_counter()
            steps = self._epoch(epoch, data)
            images = len(steps) * self.settings.images_per_step
            line = monitor.end_epoch(epoch, steps, time.perf_counter() - started, images)
            self._report(line)
            self._save(self.latest, epoch + 1)
        self._save(self.final, self.settings.epochs)
        self.latest.unlink(missing_ok=True)

    def step(self, batch: Mapping[str, Any], number: int) -> dict[str, float]:
        """One optimiser step on a collated batch; returns its statistics."""
        rate = learning_rate(number, self.total_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(generator_for(self.task.settings.seed, number).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        statistics = self.backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return {**statistics, "learning_rate": rate, "gradient_norm": norm, "skipped": float(not math.isfinite(norm))}

    def backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Gradients of one batch, in as many passes as memory asks for; returns loss and statistics."""
        statistics: dict[str, float] = {}

        def loss(embeddings: Tensor) -> Tensor:
            value, found = self.task.objective.loss(embeddings, batch)
            statistics.update(found)
            return value

        chunk = self.task.patches_per_pass
        chunks = [self.rows[start : start + chunk] for start in range(0, len(self.rows), chunk)]
        value = backward_with_cache(
            lambda rows: self._encode(batch, rows), chunks, loss, self.task.device, self.scaler.scale
        )
        return {"loss": float(value), **statistics}

    def _encode(self, batch: Mapping[str, Any], rows: list[Row]) -> Tensor:
        views = self._render(batch, rows)
        points = [self.task.objective.coordinates(batch, *row).to(self.task.device) for row in rows]
        with torch.autocast("cuda") if self.task.device.type == "cuda" else nullcontext():
            embeddings: Tensor = self.encoder(views, points)
        return embeddings.float()

    @torch.no_grad()
    def _render(self, batch: Mapping[str, Any], rows: list[Row]) -> Tensor:
        task = self.task
        return render_views(batch, rows, task.source, task.geometry, task.settings.views, task.device)

    def _plot_views(self) -> None:
        images = min(4, self.settings.images_per_step)
        batch = default_collate([self.data[index] for index in range(images)])
        rows = [row for row in self.rows if row[0] < images]
        views = self._render(batch, rows).cpu().unflatten(0, (images, -1))
        plot_views(batch, views, self.task.folder / "views.png")

    def _batches(self, first_epoch: int) -> Iterator[Any]:
        first_step = first_epoch * self.settings.iterations_per_epoch
        return batches(self.data, self.settings.images_per_step, first_step, self.task.workers)

    def _epoch(self, epoch: int, data: Iterator[Any]) -> list[dict[str, float]]:
        length = self.settings.iterations_per_epoch
        steps = []
        # disable=None: the bar is drawn on a terminal only
        with tqdm(total=length, desc=f"pretraining {epoch + 1}/{self.settings.epochs}", disable=None) as bar:
            for number in range(epoch * length, (epoch + 1) * length):
                steps.append(self.step(next(data), number))
                bar.set_postfix(loss=f"{steps[-1]['loss']:.3f}")
                bar.update()
        # a gradient scaler begins with a few skipped steps, whose loss is finite
        if all(step["skipped"] and not (self.scaler.is_enabled() and math.isfinite(step["loss"])) for step in steps):
            raise UserError(
                f"pretraining epoch {epoch}: no step had finite gradients (loss {steps[-1]['loss']}); look for extreme "
                "intensities with `nnunet_cfcl doctor --data`, or lower pretrain.initial_lr"
            )
        return steps

    def _report(self, line: Mapping[str, float]) -> None:
        self.task.log(
            f"Pretraining epoch {line['epoch']:.0f}: loss {line['loss']:.4f}, alignment {line['alignment']:.3f}, "
            f"uniformity {line['uniformity']:.3f}, anchors with a positive {line['positives']:.1%}, "
            f"{line['images_per_second']:.1f} images/s, {line['seconds']:.1f} s"
            + (f", {line['skipped']:.0%} of the steps skipped (gradients not finite)" if line["skipped"] else "")
        )
        warning = collapse_warning(line)
        # a network that is still warming up embeds everything alike, which is no collapse
        if warning and line["epoch"] + 1 > self.settings.warmup_fraction * self.settings.epochs:
            self.task.log(warning)

    def _save(self, file: Path, epoch: int) -> None:
        if not self.task.checkpoints:
            return
        content = {
            "network_weights": self.network.state_dict(),
            "projection_head": self.encoder.head.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.scaler.state_dict(),
            "epoch": epoch,
            "identity": dict(self.task.identity),
            "settings": self.task.settings.to_dict(),
            "hash": digest(self.task.identity),
        }
        save_checkpoint(content, file)

    def _restore(self) -> int:
        content = load_checkpoint(self.latest)
        check_same_identity(content["identity"], self.task.identity, self.latest)
        load_body(self.network, content["network_weights"])
        self.encoder.head.load_state_dict(content["projection_head"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if content["grad_scaler_state"] and self.scaler.is_enabled():  # empty where the run was begun on a CPU
            self.scaler.load_state_dict(content["grad_scaler_state"])
        epoch = int(content["epoch"])
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


def _rows(images: int, views: int) -> list[Row]:
    return [(image, view) for image in range(images) for view in range(views)]


def _trained(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that reach the last decoder map: all but the (deep supervision) segmentation layers."""
    return [p for name, p in network.named_parameters() if ".seg_layers." not in f".{name}"]
