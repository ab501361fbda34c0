"""Sizes of an HVAE as plain data, with the published preset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Resolution:
    """Sizes of an HVAE at one resolution.

    Attributes:
        shape: spatial shape (D,) in voxels; along every axis a multiple of the next coarser shape.
        width: number of feature channels.
        encoder_blocks: number of residual blocks before the downsampling block.
        decoder_blocks: number of decoder blocks, each with a latent code.
        latent: number of channels of each latent code.
        stochastic: whether the codes are random; if False, a code is the mean of its prior.
    """

    shape: tuple[int, ...]
    width: int
    encoder_blocks: int
    decoder_blocks: int
    latent: int
    stochastic: bool = True


@dataclass(frozen=True)
class HVAESizes:
    """All sizes of an HVAE.

    Attributes:
        resolutions: the resolutions from the finest (the shape of the image) to the coarsest.
        channels: number of image channels.
        parents: length of the encoded attributes.
        embedding: width of the parents' embedding.
        bottleneck: divisor of a resolution's width that gives the inner width of its blocks.
        dropout: dropout probability in the residual blocks.
        bias_maps_up_to: largest side length, in voxels, of a resolution with a learned bias map.
        likelihood: likelihood of the intensities; "discretised" for intensities on a regular grid.
        bin_width, low, high: step, first and last point of the grid; used by "discretised" only.
        log_scale: natural logarithm of the fixed scale of the likelihood; None: a learned scale for every voxel.
        prior: "conditional": the prior of every code depends on the parents, as in the paper; "exogenous": it does
            not, so that the codes have the same distribution for all parents and cannot carry the attributes.

    Raises:
        ValueError: a resolution is not a multiple of the next coarser one.
    """

    resolutions: tuple[Resolution, ...]
    channels: int = 1
    parents: int = 3
    embedding: int = 32
    bottleneck: int = 4
    dropout: float = 0.1
    bias_maps_up_to: int = 64
    likelihood: Literal["continuous", "discretised"] = "continuous"
    bin_width: float = 2 / 255
    low: float = -1.0
    high: float = 1.0
    log_scale: float | None = None
    prior: Literal["conditional", "exogenous"] = "conditional"

    def __post_init__(self) -> None:
        for fine, coarse in zip(self.resolutions, self.resolutions[1:]):
            if len(fine.shape) != len(coarse.shape) or any(n % m for n, m in zip(fine.shape, coarse.shape)):
                raise ValueError(f"every resolution must be a multiple of the next coarser one, found {fine.shape} "
                                 f"followed by {coarse.shape}")


def paper_sizes() -> HVAESizes:
    """The sizes of arXiv 2603.17110 for 224 x 224 images."""
    shapes, widths = (224, 112, 56, 28, 14, 7, 1), (32, 64, 96, 128, 160, 192, 512)
    encoder, decoder = (2, 4, 9, 14, 14, 9, 5), (3, 5, 10, 15, 15, 10, 5)
    latent = (1, 6, 12, 18, 24, 30, 48)
    resolutions = tuple(
        Resolution((shape, shape), width, *blocks, codes, shape <= 56)
        for shape, width, blocks, codes in zip(shapes, widths, zip(encoder, decoder), latent))
    # the paper does not report its fixed scale; this one is about one grey level
    return HVAESizes(resolutions, likelihood="discretised", log_scale=-math.log(100))


def sizes_from_json(content: Mapping[str, Any]) -> HVAESizes:
    """Inverse of `dataclasses.asdict`, also after a JSON round trip that turned tuples into lists."""
    resolutions = tuple(Resolution(**{**one, "shape": tuple(one["shape"])}) for one in content["resolutions"])
    return HVAESizes(**{**content, "resolutions": resolutions})
