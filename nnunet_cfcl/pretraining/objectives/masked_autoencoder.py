"""Masked autoencoding: the network fills in blocks cut out of its input."""

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
    """The error of each view's reconstruction from what the mask leaves of it.

    Args:
        network: returns a feature map (N, F, *patch).
        width: F.
        channels: C, the image's channels.
        dimensions: D, the image's spatial axes.
    """

    def __init__(self, network: nn.Module, width: int, channels: int, dimensions: int) -> None:
        super().__init__(network)
        self.reconstruct = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(width, channels, kernel_size=1)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Mean squared error (N,) over the masked voxels of images (N, C, *patch); masks (N, 1, *patch) bool, True
        where the network is shown a zero."""
        reconstruction = self.reconstruct(self.network(images.masked_fill(masks, 0)))
        error = (reconstruction - images).square().mean(1, keepdim=True)
        per_view: Tensor = (error * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
        return per_view


@dataclass(frozen=True)
class MaskedAutoencoderObjective:
    """MAE (He et al. 2021, arXiv 2111.06377) for U-Nets, as in Wald et al. 2024 (arXiv 2410.23132).

    Blocks of the view are set to zero, encoder and decoder together predict the view, the mean squared error counts
    on the masked voxels alone. The target is the view itself, in nnU-Net's normalised intensities. Differences: the
    masked blocks have a fixed side in voxels, not one of the lowest map's voxels, so that thick slices and small
    patches have enough of them; features of masked places are not masked again deeper in the network.

    Args:
        patch_size: (D,) voxels of a view.
        channels: C, of the images.
        mask_ratio: share of the blocks that is masked, in (0, 1); at least one is, and at least one is not.
        mask_block: side of a block in voxels. An axis is divided into equal blocks of nearly this side (the sides
            differ by one voxel where they must), a shorter axis into one.

    Raises:
        UserError: the patch has no two blocks.
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
                f"masked autoencoding needs at least 2: set baseline.mask_block to at most {max(self.patch_size) // 2}"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks per axis."""
        return tuple(max(1, round(n / self.mask_block)) for n in self.patch_size)

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """``masks`` (V, *grid) bool, the same number of blocks in every view."""
        blocks = math.prod(self.grid)
        masked = min(max(1, round(self.mask_ratio * blocks)), blocks - 1)
        rank = torch.rand(len(image.matrices), blocks, generator=generator).argsort(-1).argsort(-1)
        return {"masks": (rank < masked).unflatten(-1, self.grid)}

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> Tensor:
        """Masks (len(rows), 1, *patch) bool."""
        images, views = torch.tensor(rows).unbind(1)
        masks: Tensor = batch["drawn"]["masks"][images, views].to(device)
        for axis, (size, blocks) in enumerate(zip(self.patch_size, self.grid, strict=True), start=1):
            masks = masks.index_select(axis, torch.arange(size, device=device) * blocks // size)
        return masks[:, None]

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> MaskedAutoencoder:
        """The network with a linear layer that turns its features into intensities."""
        return MaskedAutoencoder(network, width, self.channels, len(self.patch_size))

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean of the views' errors."""
        return outputs.mean(), {}
