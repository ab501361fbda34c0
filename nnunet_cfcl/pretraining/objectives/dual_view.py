"""Objectives on pairs of views: DVD-CL, S-DVD-CL, VADeR (method section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.losses import CountedLoss, dvd_cl_loss, s_dvd_cl_loss
from nnunet_cfcl.pretraining.objective import ImageViews, PretrainingModel, Tap
from nnunet_cfcl.pretraining.pixel_encoder import PixelEncoder
from nnunet_cfcl.pretraining.point_labels import PointLabels, where_labelled
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.pretraining.statistics import contrast_statistics
from nnunet_cfcl.views import draw_corresponding_points, to_view


@dataclass(frozen=True)
class DualViewObjective:
    """View 0 (the original) against every other view: mean loss of the pairs (0, i), i = 1..V-1.

    Args:
        points: P, points per image and pair of views.
        labels: labels that define the positives, by class; images without labels use corresponding points. None:
            corresponding points everywhere.
        ignore_radius: millimetres, see `losses.dvd_cl_loss`.
        hard_negatives: see `losses.dvd_cl_loss`.
    """

    points: int
    labels: PointLabels | None = None
    ignore_radius: float = 0.0
    hard_negatives: float = 0.0

    tap: ClassVar[Tap] = "decoder"
    separable: ClassVar[bool] = False
    labelled_only: ClassVar[bool] = False

    @property
    def needs_labels(self) -> bool:
        """Whether labels define the positives."""
        return self.labels is not None

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Draw ``points`` (V-1, P, D) in canonical millimetres and ``valid`` (V-1, P), with the entries of
        `PointLabels.read`."""
        balance = self.labels.balance(image) if self.labels else None
        points, valid = draw_corresponding_points(
            generator, image.matrices, image.geometry, image.tissue, self.points, balance
        )
        known = self.labels.read(image, points) if self.labels else {}
        return {"points": points, "valid": valid, **known}

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> list[Tensor]:
        """Compute the places to read: view 0 at the points of all pairs, ((V-1) P, D), another view at those of its
        pair, (P, D)."""
        points, matrices = batch["drawn"]["points"], batch["matrices"]
        return [
            to_view(points[i].flatten(0, 1) if view == 0 else points[i, view - 1], matrices[i, view]).to(device)
            for i, view in rows
        ]

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> PixelEncoder:
        """Build the encoder of points."""
        return PixelEncoder(network, width, settings)

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Average the losses of the pairs from embeddings (B 2 (V-1) P, d); return it with the monitor's statistics."""
        assert isinstance(model, PixelEncoder)
        valid, temperature = drawn["valid"], model.temperature()
        images, pairs, points = valid.shape
        a, b = outputs.view(images, 2, pairs, points, -1).unbind(1)
        found = [self._pair_loss(a[:, i], b[:, i], _pair(drawn, i), temperature) for i in range(pairs)]
        value = torch.stack([one.loss for one in found]).mean()
        uninformed = 2 * math.log(max(1.0, float(valid.sum()) / pairs))
        return value, contrast_statistics(found, a[valid], uninformed, temperature)

    def _pair_loss(
        self, a: Tensor, b: Tensor, drawn: Mapping[str, Tensor], temperature: float | Tensor
    ) -> CountedLoss:
        def plain(valid: Tensor) -> CountedLoss:
            return dvd_cl_loss(
                a, b, temperature, valid, positions=drawn["points"] if self.ignore_radius else None,
                ignore_radius=self.ignore_radius, hard_negatives=self.hard_negatives,
            )

        def supervised(valid: Tensor) -> CountedLoss:
            assert self.labels is not None
            return s_dvd_cl_loss(
                a, b, drawn["labels"], drawn["labels"], temperature, self.labels.background, valid, drawn["weights"],
                hard_negatives=self.hard_negatives,
            )

        if self.labels is None:
            return plain(drawn["valid"])
        return where_labelled(drawn["labelled"], drawn["valid"], supervised, plain)


def _pair(drawn: Mapping[str, Tensor], pair: int) -> dict[str, Tensor]:
    """Select one pair (B, ...) of the draws (B, V-1, ...)."""
    return {key: value if value.ndim == 1 else value[:, pair] for key, value in drawn.items()}
