"""Masked autoencoding: the network reconstructs masked blocks of its input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining.objective import ImageViews, PretrainingModel, Tap
from nnunet_cfcl.pretraining.render import Row


class MaskedAutoencoder(PretrainingModel):
    """Network with a linear reconstruction of the intensities; returns the error on the masked voxels.

    Args:
        network: returns a feature map (N, F, *patch).
        width: F.
        channels: C, channels of the images.
        dimensions: D, number of spatial axes.
    """

    def __init__(self, network: nn.Module, width: int, channels: int, dimensions: int) -> None:
        super().__init__(network)
        self.reconstruct = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(width, channels, kernel_size=1)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Compute the mean squared error (N,) over the masked voxels of images (N, C, *patch); masks (N, 1, *patch)
        are True where the input is set to zero."""
        reconstruction = self.reconstruct(self.network(images.masked_fill(masks, 0)))
        error = (reconstruction - images).square().mean(1, keepdim=True)
        per_view: Tensor = (error * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
        return per_view


@dataclass(frozen=True)
class MaskedAutoencoderObjective:
    """MAE (He et al. 2021, arXiv 2111.06377) for U-Nets, as in Wald et al. 2024 (arXiv 2410.23132).

    Blocks of the view are set to zero, encoder and decoder together predict the view, and the mean squared error is
    taken over the masked voxels alone. The target is the view itself, in nnU-Net's normalised intensities. Differences:
    the masked blocks have a fixed side in voxels instead of one voxel of the lowest feature map, so that thick slices
    and small patches have enough of them; features of masked places are not masked again deeper in the network.

    Args:
        patch_size: (D,) size of a view in voxels.
        channels: C, channels of the images.
        mask_ratio: masked share of the blocks, in (0, 1); at least one block is masked, and at least one is not.
        mask_block: side of a block in voxels. An axis is divided into equal blocks of nearly this side (the sides
            differ by one voxel where they must), a shorter axis into one.

    Raises:
        UserError: the patch holds fewer than two blocks.
    """

    patch_size: tuple[int, ...]
    channels: int
    mask_ratio: float
    mask_block: int

    tap: ClassVar[Tap] = "decoder"
    separable: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    labelled_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if math.prod(self.grid) < 2:
            raise UserError(
                f"the patch {list(self.patch_size)} is a single block of baseline.mask_block {self.mask_block} voxels, "
                "masked autoencoding needs at least 2",
                f"set baseline.mask_block to at most {max(self.patch_size) // 2}",
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks per axis."""
        return tuple(max(1, round(n / self.mask_block)) for n in self.patch_size)

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Draw ``masks`` (V, *grid) bool, the same number of blocks in every view."""
        blocks = math.prod(self.grid)
        masked = min(max(1, round(self.mask_ratio * blocks)), blocks - 1)
        rank = torch.rand(len(image.matrices), blocks, generator=generator).argsort(-1).argsort(-1)
        return {"masks": (rank < masked).unflatten(-1, self.grid)}

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> Tensor:
        """Expand the masks to voxels, (len(rows), 1, *patch) bool."""
        images, views = torch.tensor(rows).unbind(1)
        masks: Tensor = batch["drawn"]["masks"][images, views].to(device)
        for axis, (size, blocks) in enumerate(zip(self.patch_size, self.grid, strict=True), start=1):
            masks = masks.index_select(axis, torch.arange(size, device=device) * blocks // size)
        return masks[:, None]

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> MaskedAutoencoder:
        """Add the linear layer from features to intensities."""
        return MaskedAutoencoder(network, width, self.channels, len(self.patch_size))

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Average the errors of the views."""
        return outputs.mean(), {}
