"""Embeddings of points: network up to its last decoder map, read at the points, projected (method section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_cfcl.views import read_features


class PixelEncoder(nn.Module):
    """Features are read at the sampled points first, so the projection head sees those points only.

    Args:
        network: returns a feature map (N, F, *patch).
        feature_width: F.
        hidden: width of the projection head's hidden layer.
        dim: width d of the embeddings.
    """

    def __init__(self, network: nn.Module, feature_width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Sequential(nn.Linear(feature_width, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, images: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
        """Embeddings, not normalised.

        Args:
            images: (N, C, *patch).
            coordinates: N tensors (K_n, D), normalised view coordinates in array order.

        Returns:
            (K_1 + ... + K_N, d), image by image.
        """
        features = self.network(images)
        read = [read_features(features[n : n + 1], points[None])[0] for n, points in enumerate(coordinates)]
        embeddings: Tensor = self.head(torch.cat(read))
        return embeddings
