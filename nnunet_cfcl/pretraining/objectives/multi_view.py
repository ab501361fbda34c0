"""Objectives on all views together: MVD-CL, S-MVD-CL, SSDCL (method section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.losses import CountedLoss, mvd_cl_loss, s_mvd_cl_loss
from nnunet_cfcl.pretraining.objective import ImageViews, PretrainingModel, Tap
from nnunet_cfcl.pretraining.pixel_encoder import PixelEncoder
from nnunet_cfcl.pretraining.point_labels import PointLabels, where_labelled
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.pretraining.statistics import contrast_statistics
from nnunet_cfcl.views import draw_view_points, to_view


@dataclass(frozen=True)
class MultiViewObjective:
    """All V views in one pool, each with points of its own.

    Args:
        points: P, points per view.
        radius: share of the crop's longest side, see `losses.mvd_cl_loss`.
        labels: labels that define the positives, by class; images without labels use near points. None: near points
            everywhere.
        hard_negatives: see `losses.mvd_cl_loss`.
    """

    points: int
    radius: float
    labels: PointLabels | None = None
    hard_negatives: float = 0.0

    tap: ClassVar[Tap] = "decoder"
    separable: ClassVar[bool] = False
    labelled_only: ClassVar[bool] = False

    @property
    def needs_labels(self) -> bool:
        """Whether labels define the positives."""
        return self.labels is not None

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Draw ``points`` (V, P, D) in canonical millimetres, ``positions``, the same in [0, 1], and ``valid`` (V, P),
        with the entries of `PointLabels.read`."""
        balance = self.labels.balance(image) if self.labels else None
        points, valid = draw_view_points(
            generator, image.matrices, image.geometry, image.tissue, self.points, balance
        )
        extent = max(n * h for n, h in zip(image.crop_size, image.geometry.spacing))
        known = self.labels.read(image, points) if self.labels else {}
        return {"points": points, "positions": points / extent + 0.5, "valid": valid, **known}

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> list[Tensor]:
        """Compute the places to read, (P, D): every view at its own points."""
        points, matrices = batch["drawn"]["points"], batch["matrices"]
        return [to_view(points[i, view], matrices[i, view]).to(device) for i, view in rows]

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> PixelEncoder:
        """Build the encoder of points."""
        return PixelEncoder(network, width, settings)

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of the pool from embeddings (B V P, d); return it with the monitor's statistics."""
        assert isinstance(model, PixelEncoder)
        valid, temperature = drawn["valid"], model.temperature()
        z = outputs.view(*valid.shape, -1)

        def plain(valid: Tensor) -> CountedLoss:
            return mvd_cl_loss(
                z, drawn["positions"], temperature, self.radius, valid, hard_negatives=self.hard_negatives
            )

        def supervised(valid: Tensor) -> CountedLoss:
            assert self.labels is not None
            return s_mvd_cl_loss(
                z, drawn["labels"], temperature, self.labels.background, valid, drawn["weights"],
                hard_negatives=self.hard_negatives,
            )

        found = where_labelled(drawn["labelled"], valid, supervised, plain) if self.labels else plain(valid)
        uninformed = math.log(max(1.0, float(valid.sum()) - 1))
        return found.loss, contrast_statistics([found], z[valid], uninformed, temperature)
