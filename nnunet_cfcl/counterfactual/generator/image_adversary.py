"""An adversary that tells decoded counterfactuals from decoded images of the group they should belong to.

It learns the attributes of what is decoded from an image's codes and its own parents, and learns to see through what is
decoded from the same codes and other parents: there it names the attributes of the original. The generator is taught to
have its counterfactuals taken for what they should be. Both sides of the comparison come out of the decoder, so that
noise and fine detail, which no decoder makes, give nothing away.

This is counterfactual training against an attribute predictor (Ribeiro et al. 2023, arXiv 2306.15764, section 3.3) with
a predictor that learns along, as the discriminator of StarGAN does (Choi et al. 2018, arXiv 1711.09020): a fixed one is
soon pleased by changes that nobody sees.
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
    """Strided convolutions without normalisation, for the intensities are what it is about. Spectral norms (Miyato et
    al. 2018, arXiv 1802.05957) keep it from getting so sure of itself that nothing can be learned from it.

    Args:
        patch_size: (D,) in voxels.
        channels: of the images.
        attributes: binary or categorical ones.
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
        """Logits (B, K, M) at M places, and (B, K, 1) of the whole image, for `adversarial_cross_entropy`."""
        features = self.layers(images)
        flat = features.flatten(2)
        return [self.local(features).flatten(2), self.whole(torch.cat([flat.mean(2), flat.amax(2)], 1)).unsqueeze(2)]
