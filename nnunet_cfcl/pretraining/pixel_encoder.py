"""Embeddings of points: the last decoder map, sampled at the points and projected (method section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.pretraining.objective import PretrainingModel
from nnunet_cfcl.pretraining.temperature import Temperature
from nnunet_cfcl.views import read_features


def projection_head(width: int, settings: PretrainSettings) -> nn.Sequential:
    """Projection of ``width`` features to embeddings, with one hidden layer; discarded after the pretraining."""
    hidden = settings.projection_hidden
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, settings.projection_dim))


class PixelEncoder(PretrainingModel):
    """Network and projection head. The head is applied to the features at the sampled points only.

    Args:
        network: network that returns a feature map (N, F, *patch).
        width: number of channels F.
        settings: widths of the head, temperature.
    """

    def __init__(self, network: nn.Module, width: int, settings: PretrainSettings) -> None:
        super().__init__(network)
        self.head = projection_head(width, settings)
        self.temperature = Temperature(settings.temperature, settings.learn_temperature)

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """The temperature, where it is learned."""
        return list(self.temperature.parameters())

    def forward(self, images: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
        """Embeddings, not normalised.

        Args:
            images: (N, C, *patch).
            coordinates: N tensors (K_n, D), normalised view coordinates in array order.

        Returns:
            (K_1 + ... + K_N, d), image by image.
        """
        embeddings: Tensor = self.head(read_points(self.network(images), coordinates))
        return embeddings


def read_points(features: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """Features (K_1 + ... + K_N, F) of a map (N, F, *patch) at N lists of normalised coordinates (K_n, D)."""
    return torch.cat([read_features(features[n : n + 1], points[None])[0] for n, points in enumerate(coordinates)])
