"""Phase 1: the pretraining of a network, or a part of it, with any objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.errors import UserError, best_effort
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.gallery import plot_views
from nnunet_cfcl.pretraining.gradient_cache import backward_with_cache, check_norms
from nnunet_cfcl.pretraining.monitor import TITLES, collapse_warning, plot_progress
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.pretraining.render import Row, render_views
from nnunet_cfcl.runs.checkpoint import load_body
from nnunet_cfcl.runs.epochs import EpochLoop, Line, TrainingTask
from nnunet_cfcl.runs.scaled_step import lowers_its_scale, restore_scaler, scaled_step
from nnunet_cfcl.runs.schedule import learning_rate
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views import ViewGeometry, check_patch


@dataclass(frozen=True, kw_only=True)
class PretrainingTask(TrainingTask):
    """Everything that a pretraining depends on; see `TrainingTask` for the other fields.

    Attributes:
        reader: reader of the cases.
        source: source of the counterfactuals.
        objective: the pretraining method.
        geometry: patch size and spacing.
        patches_per_pass: size of a micro-batch, the number of patches whose graph fits into memory.
        compile: wraps the network, e.g. ``torch.compile``.
        ignore_label: label of voxels whose class is unknown; None: there is none.
        track: passes every epoch's line on to experiment loggers.
    """

    reader: CaseReader
    source: CounterfactualSource
    objective: Objective
    geometry: ViewGeometry
    patches_per_pass: int
    compile: Callable[[nn.Module], nn.Module] = field(default=lambda network: network)
    ignore_label: int | None = None
    track: Callable[[Line], None] = field(default=lambda line: None)


class Pretraining(EpochLoop[Mapping[str, Any]]):
    """The pretraining with one objective, see `EpochLoop`.

    Args:
        network: the whole network, whose weights are saved.
        features: the part of it that is trained, (N, C, *patch) -> (N, width, ...), see `Objective.tap`.
        width: number of channels that ``features`` returns.
        task: cases, objective, settings, device and folder.

    Raises:
        UserError: a patch too small for the views; a batch norm with a batch of several micro-batches or ranks; fewer
            images than ranks.
    """

    task: PretrainingTask
    title, shown = "pretraining", "loss"

    def __init__(self, network: nn.Module, features: nn.Module, width: int, task: PretrainingTask) -> None:
        check_patch(task.geometry, task.settings.views)
        self.settings, self.objective = task.settings.pretrain, task.objective
        chosen = self.settings
        super().__init__(task, chosen.epochs, chosen.iterations_per_epoch, chosen.images_per_step,
                         "pretrain.images_per_step")
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
        self.data = PretrainingDataset(
            task.reader, task.source, task.objective, task.geometry, task.settings, self.total_steps, task.ignore_label
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Groups with and without weight decay, which would pull a learned temperature towards 1."""
        spared = {id(p) for p in self.model.loss_parameters()}
        groups = [{"params": [p for p in self.parameters if id(p) not in spared]}]
        alone = [p for p in self.parameters if id(p) in spared]
        return [*groups, {"params": alone, "weight_decay": 0.0}] if alone else groups

    # ---------------------------------------------------------------- a step

    def step(self, batch: Mapping[str, Any], number: int) -> dict[str, float]:
        """One optimiser step on this rank's collated images; returns its statistics."""
        chosen = self.settings
        rate = learning_rate(number, self.total_steps, chosen.initial_lr, chosen.final_lr, chosen.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(generator_for(self.task.settings.seed, number, self.ranks.rank).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        running = [buffer.clone() for buffer in self.model.buffers()]
        statistics = self.backward(batch)
        self.ranks.sum_gradients(self.parameters, self.model.loss_parameters())
        norm = scaled_step(self.optimizer, self.scaler, self.parameters, chosen.clip_norm)
        if not math.isfinite(norm):
            # the forward pass has moved the statistics of batch norms, which would stay NaN for good
            for buffer, before in zip(self.model.buffers(), running, strict=True):
                buffer.copy_(before)
        self.model.after_step((number + 1) / self.total_steps)
        return {**statistics, "learning_rate": rate, "gradient_norm": norm, "skipped": float(not math.isfinite(norm))}

    def backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """This rank's part of the gradients, micro-batch by micro-batch; returns loss and statistics."""
        chunk = self.task.patches_per_pass
        chunks = [self.rows[start : start + chunk] for start in range(0, len(self.rows), chunk)]
        return self._accumulate(batch, chunks) if self.objective.separable else self._contrast(batch, chunks)

    def _contrast(self, batch: Mapping[str, Any], chunks: Sequence[list[Row]]) -> dict[str, float]:
        """Gradients of a loss of all embeddings of all ranks together."""
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
        """Gradients of a loss that is a mean over the views."""
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

    # ---------------------------------------------------------------- an epoch

    def begin(self) -> None:
        """Draw the views of a few images."""
        self.model.train()
        if self.saves:
            self._plot_views()

    def _plot_views(self) -> None:
        images = min(4, len(self.images))
        batch = default_collate([self.data[index] for index in range(images)])
        rows = [row for row in self.rows if row[0] < images]
        views = self.render(batch, rows).cpu().unflatten(0, (images, -1))
        others = "view" if self.task.source.name == "none" else "counterfactual"
        picture = self.task.folder / "views.png"
        with best_effort(picture, self.task.log):
            replace_atomically(picture, lambda file: plot_views(batch, views, file, others))

    def plot(self, lines: Sequence[Line], file: Path) -> None:
        """See `plot_progress`."""
        plot_progress(lines, file)

    def report(self, line: Line) -> None:
        """Log the loss and the statistics of the embeddings, and warn of collapsed ones."""
        formats = {"alignment": ".3f", "uniformity": ".3f", "temperature": ".3f", "positives": ".1%"}
        self.task.log(
            f"Pretraining epoch {line['epoch']:.0f}: loss {line['loss']:.4f}, "
            + "".join(f"{TITLES[key]} {line[key]:{form}}, " for key, form in formats.items() if key in line)
            + f"{line['images_per_second']:.1f} images/s, {line['seconds']:.1f} s"
            + (f", {line['skipped']:.0%} of the steps skipped (gradients not finite)" if line["skipped"] else "")
        )
        warning = collapse_warning(line)
        # a network that is still warming up embeds everything alike, which is no collapse
        if warning and line["epoch"] + 1 > self.settings.warmup_fraction * self.settings.epochs:
            self.task.log(warning)
        self.task.track(line)

    def all_skipped(self, last: Line) -> tuple[str, str] | None:
        """See `EpochLoop.all_skipped`."""
        if lowers_its_scale(self.scaler, last["loss"]):
            return None
        return f"no step had finite gradients (loss {last['loss']})", "pretrain.initial_lr"

    # ---------------------------------------------------------------- checkpoints

    def modules(self) -> Sequence[nn.Module]:
        """The model."""
        return (self.model,)

    def state(self) -> dict[str, Any]:
        """The network's weights, which nnU-Net's ``-pretrained_weights`` accepts, and all else that is trained."""
        return {
            "network_weights": self.network.state_dict(),
            "model": self.model.additions(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.scaler.state_dict(),
            "settings": self.task.settings.to_dict(),
        }

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore `state`."""
        load_body(self.network, content["network_weights"], keep_heads=self.objective.tap != "segmentation")
        self.model.load_additions(content["model"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        restore_scaler(self.scaler, content["grad_scaler_state"])

    def check_identity(self, content: Mapping[str, Any]) -> None:
        """See `check_same_identity`."""
        check_same_identity(content["identity"], self.task.identity, self.latest)


def check_same_identity(found: Mapping[str, Any], expected: Mapping[str, Any], file: Path) -> None:
    """Reject the checkpoint of another pretraining.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    before, now = _flat(found), _flat(expected)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        values = [(key, _short(before.get(key)), _short(now.get(key))) for key in changed[:5]]
        differences = "; ".join(f"{key}: {old} then, {new} now" for key, old, new in values)
        raise UserError(f"{file} was made with other settings ({differences})",
                        "restore them to continue with --c, or start over without --c")


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
