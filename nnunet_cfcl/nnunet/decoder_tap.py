"""Taps of an nnU-Net network without re-implementing it: last decoder map (method, section 3), encoder, whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_cfcl.errors import UserError


def plain_network(network: nn.Module) -> nn.Module:
    """The network inside its DistributedDataParallel and torch.compile wrappers."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    return network


def decoder_width(network: nn.Module) -> int:
    """Channels F of the last decoder map.

    Raises:
        UserError: the network has no nnU-Net decoder (``decoder.seg_layers``).
    """
    decoder: Any = getattr(plain_network(network), "decoder", None)
    if not hasattr(decoder, "seg_layers") or not hasattr(decoder, "deep_supervision"):
        raise UserError(
            f"{type(plain_network(network)).__name__} has no decoder of nnU-Net's U-Net kind (decoder.seg_layers), "
            "expected a PlainConvUNet or ResidualEncoderUNet",
            "use a plan with one of these architectures"
        )
    return int(decoder.seg_layers[-1].in_channels)


@contextmanager
def last_decoder_map(network: nn.Module, layer: nn.Module | None = None) -> Iterator[nn.Module]:
    """Let the yielded network return its last decoder map (N, F, *patch) within the block, then restore it.

    The last segmentation layer is replaced by an identity and deep supervision is switched off. Replace before
    compiling: torch.compile does not see later changes. Within the block the state dict lacks the replaced layer.

    Args:
        network: nnU-Net's network, wrapped or not.
        layer: module to apply to the last decoder map; None: identity.

    Raises:
        UserError: the network has no nnU-Net decoder.
    """
    decoder_width(network)
    plain = plain_network(network)
    decoder: Any = plain.decoder
    segmentation_layer, deep_supervision = decoder.seg_layers[-1], decoder.deep_supervision
    decoder.seg_layers[-1], decoder.deep_supervision = layer or nn.Identity(), False
    try:
        yield plain
    finally:
        decoder.seg_layers[-1], decoder.deep_supervision = segmentation_layer, deep_supervision


class EncoderMap(nn.Module):
    """The encoder's lowest-resolution map (N, F, *lowest) of images (N, C, *patch)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Return the last skip connection."""
        lowest: Tensor = self.encoder(images)[-1]
        return lowest


@dataclass(frozen=True)
class Tapped:
    """A tapped part of a network.

    Attributes:
        network: whole network without wrappers, whose state dict is saved.
        features: tapped part, (N, C, *patch) -> (N, width, ...); for "segmentation" the network, which returns logits.
        width: number of output channels of the part.
    """

    network: nn.Module
    features: nn.Module
    width: int


@contextmanager
def tapped(network: nn.Module, tap: Literal["decoder", "encoder", "segmentation"]) -> Iterator[Tapped]:
    """Yield a part of the network for the duration of the block; see `last_decoder_map` for the decoder.

    Raises:
        UserError: the network has no nnU-Net decoder.
    """
    width = decoder_width(network)
    plain: Any = plain_network(network)
    if tap == "decoder":
        with last_decoder_map(network) as features:
            yield Tapped(plain, features, width)
    elif tap == "encoder":
        yield Tapped(plain, EncoderMap(plain.encoder), int(plain.encoder.output_channels[-1]))
    else:
        yield Tapped(plain, plain, int(plain.decoder.seg_layers[-1].out_channels))
