"""Contrast between whole images, on pooled features of the encoder: SimCLR, CF-SimCLR (method section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.losses import nt_xent_loss
from nnunet_cfcl.pretraining.objective import ImageViews, PretrainingModel, Tap
from nnunet_cfcl.pretraining.pixel_encoder import projection_head
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.pretraining.statistics import contrast_statistics
from nnunet_cfcl.pretraining.temperature import Temperature


class ImageEncoder(PretrainingModel):
    """Encoder of images: the feature map averaged over space, then projected.

    Args:
        network: returns a feature map (N, F, ...).
        width: F.
        settings: widths of the head, and whether the temperature is learned.
        temperature: temperature; the start value of a learned one.
    """

    def __init__(self, network: nn.Module, width: int, settings: PretrainSettings, temperature: float) -> None:
        super().__init__(network)
        self.head = projection_head(width, settings)
        self.temperature = Temperature(temperature, settings.learn_temperature)

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Return the temperature's parameter, if it is learned."""
        return list(self.temperature.parameters())

    def forward(self, images: Tensor, inputs: None = None) -> Tensor:
        """Compute embeddings (N, d), not normalised, of images (N, C, *patch)."""
        embeddings: Tensor = self.head(self.network(images).flatten(2).mean(-1))
        return embeddings


@dataclass(frozen=True)
class ImageContrastObjective:
    """SimCLR (Chen et al. 2020, arXiv 2002.05709, equation 1): views of one image attract, all others repel.

    With V > 2 views every other view of the image is a positive. The decoder is not trained.

    Args:
        temperature: temperature of the loss; the start value of a learned one.
    """

    temperature: float

    tap: ClassVar[Tap] = "encoder"
    separable: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    labelled_only: ClassVar[bool] = False

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Return ``views`` (), their number: nothing is random."""
        return {"views": torch.tensor(len(image.matrices))}

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> None:
        """Return None: the model needs nothing beside the views."""

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> ImageEncoder:
        """Build the encoder of images."""
        return ImageEncoder(network, width, settings, self.temperature)

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute `losses.nt_xent_loss` of embeddings (B V, d); return it with the monitor's statistics."""
        assert isinstance(model, ImageEncoder)
        temperature = model.temperature()
        embeddings = outputs.unflatten(0, (len(drawn["views"]), -1))
        found = nt_xent_loss(embeddings, temperature)
        uninformed = math.log(max(1, len(outputs) - 1))
        return found.loss, contrast_statistics([found], outputs, uninformed, temperature)
