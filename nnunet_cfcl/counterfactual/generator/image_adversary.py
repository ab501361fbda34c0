"""Adversary that distinguishes decoded counterfactuals from decoded images of their target group.

It predicts the original's attributes both for images decoded from the codes with the original's parents and for
counterfactuals decoded from the same codes with other parents. The generator is trained to have its counterfactuals
classified as their new attributes. Both inputs come from the decoder, so that noise and fine detail, which no decoder
reproduces, carry no information.

This is counterfactual training against an attribute predictor (Ribeiro et al. 2023, arXiv 2306.15764, section 3.3) with
a predictor that is trained at the same time, like the discriminator of StarGAN (Choi et al. 2018, arXiv 1711.09020): a
fixed predictor is soon fooled by invisible changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from nnunet_cfcl.counterfactual.gate.small_training import halvings
from nnunet_cfcl.data.attributes import Attribute

WIDTHS = (24, 48, 96, 96)


class ImageAdversary(nn.Module):
    """Attribute classifier of strided convolutions, without normalisation layers, which would hide intensity changes.

    Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) keeps its gradients informative.

    Args:
        patch_size: (D,) in voxels.
        channels: number of image channels.
        attributes: binary or categorical attributes to predict.
    """

    def __init__(self, patch_size: Sequence[int], channels: int, attributes: Sequence[Attribute]) -> None:
        super().__init__()
        self.counts = [len(attribute.values) for attribute in attributes]
        conv: Callable[..., nn.Module] = nn.Conv2d if len(patch_size) == 2 else nn.Conv3d
        layers: list[nn.Module] = []
        before = channels
        for level, (width, stride) in enumerate(zip(WIDTHS, halvings(patch_size, 6, len(WIDTHS)))):
            layer = conv(before, width, 3 if level else 5, stride=stride, padding=1 if level else 2)
            layers += [spectral_norm(layer), nn.LeakyReLU(0.2)]
            before = width
        last = spectral_norm(conv(before, before, 3, padding=1))
        self.layers = nn.Sequential(*layers, last, nn.LeakyReLU(0.2))
        self.local = spectral_norm(conv(before, sum(self.counts), 1))
        self.whole = spectral_norm(nn.Linear(2 * before, sum(self.counts)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (B, K, M) at M positions and (B, K, 1) of the whole image, for `adversarial_cross_entropy`."""
        features = self.layers(images)
        flat = features.flatten(2)
        return [self.local(features).flatten(2), self.whole(torch.cat([flat.mean(2), flat.amax(2)], 1)).unsqueeze(2)]
