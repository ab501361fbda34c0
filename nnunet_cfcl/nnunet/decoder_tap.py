"""Parts of an nnU-Net network, tapped instead of re-implemented: last decoder map (method section 3), encoder."""

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
    """The network without DistributedDataParallel and torch.compile around it."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    return network


def decoder_width(network: nn.Module) -> int:
    """Channels F of the last decoder map.

    Raises:
        UserError: the network has no decoder of nnU-Net's kind (``decoder.seg_layers``).
    """
    decoder: Any = getattr(plain_network(network), "decoder", None)
    if not hasattr(decoder, "seg_layers") or not hasattr(decoder, "deep_supervision"):
        raise UserError(
            f"{type(plain_network(network)).__name__} has no decoder of nnU-Net's U-Net kind (decoder.seg_layers), "
            "expected a PlainConvUNet or ResidualEncoderUNet: choose a plan with one of these architectures"
        )
    return int(decoder.seg_layers[-1].in_channels)


@contextmanager
def last_decoder_map(network: nn.Module, layer: nn.Module | None = None) -> Iterator[nn.Module]:
    """Within the block the yielded network returns its last decoder map (N, F, *patch), or what ``layer`` makes of it;
    afterwards it is as before.

    The last segmentation layer is swapped for an identity, or ``layer``, and deep supervision is off. Swap before
    compiling: torch.compile does not see later changes. Keys of the state dict lack that one layer within the block.
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
    """The encoder's lowest map (N, F, *lowest) of images (N, C, *patch)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """The last of the skip connections."""
        lowest: Tensor = self.encoder(images)[-1]
        return lowest


@dataclass(frozen=True)
class Tapped:
    """A part of a network.

    Args:
        network: the whole, without wrappers; its state dict is the one to keep.
        features: the part, (N, C, *patch) -> (N, width, ...); the whole network gives its list of logits.
        width: the part's channels.
    """

    network: nn.Module
    features: nn.Module
    width: int


@contextmanager
def tapped(network: nn.Module, tap: Literal["decoder", "encoder", "segmentation"]) -> Iterator[Tapped]:
    """A part of the network within the block; see `last_decoder_map` for the decoder.

    Raises:
        UserError: the network has no decoder of nnU-Net's kind.
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
