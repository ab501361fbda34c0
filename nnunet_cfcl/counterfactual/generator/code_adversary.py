"""An adversary that tries to tell the attributes from the codes of an image, so that the codes learn not to carry them.

What stays in the codes of one group of images cannot be changed by an intervention: if the codes tell the scanner, the
decoder reads it there, and the parents do nothing (method, section 1). A prior without parents alone does not prevent
it: one bit in a coarse code is enough, and costs next to nothing. The adversary makes it dear (Lample et al. 2017,
"Fader networks", arXiv 1706.00409).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.generator.hvae import HVAESizes
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding

WIDTH = 32


class CodeAdversary(nn.Module):
    """Reads the codes from the coarsest resolution to the finest; guesses at every place, and of the whole image.

    Args:
        sizes: of the HVAE.
        attributes: binary or categorical ones.
    """

    def __init__(self, sizes: HVAESizes, attributes: Sequence[Attribute]) -> None:
        super().__init__()
        self.counts = [len(attribute.values) for attribute in attributes]
        self._stages = [(one.shape, one.decoder_blocks) for one in sizes.resolutions[::-1] if one.stochastic]
        self.readers, self.local, self.whole = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        conv = nn.Conv2d if len(sizes.resolutions[0].shape) == 2 else nn.Conv3d
        for one in sizes.resolutions[::-1]:
            if one.stochastic:
                kernel = 1 if max(one.shape) <= 2 else 3
                width_in = one.latent * one.decoder_blocks + len(one.shape) + (WIDTH if len(self.readers) else 0)
                self.readers.append(nn.Sequential(
                    conv(width_in, WIDTH, kernel, padding=kernel // 2), nn.LeakyReLU(0.2),
                    conv(WIDTH, WIDTH, kernel, padding=kernel // 2), nn.LeakyReLU(0.2)))
                self.local.append(conv(WIDTH, sum(self.counts), 1))
                self.whole.append(nn.Linear(2 * WIDTH, sum(self.counts)))

    def forward(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, K, M) of every resolution, K values of all attributes, M places and the whole image.

        Args:
            codes: of `Evidence.codes`, from the coarsest.
        """
        given, found = iter(codes), []
        features: Tensor | None = None
        for (shape, blocks), reader, local, whole in zip(self._stages, self.readers, self.local, self.whole):
            seen = torch.cat(list(islice(given, blocks)), 1).float()
            seen = torch.cat([seen, _coordinates(shape, seen)], 1)
            if features is not None:
                seen = torch.cat([seen, nn.functional.interpolate(features, shape)], 1)
            features = reader(seen)
            flat = features.flatten(2)
            found.append(local(features).flatten(2))
            found.append(whole(torch.cat([flat.mean(2), flat.amax(2)], 1)).unsqueeze(2))
        return found


def adversarial_cross_entropy(logits: Sequence[Tensor], targets: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean over attributes, readings and places, in nats; images whose value is unknown are left out.

    Args:
        logits: (B, K, M) each, of an adversary.
        targets: (B, K) probabilities of the values, attribute after attribute; all 0 where it is unknown.
        counts: of the values of every attribute, K together.
    """
    parts = []
    for one in logits:
        for guess, target in zip(one.split(list(counts), 1), targets.split(list(counts), 1)):
            entropy = -(torch.log_softmax(guess, 1) * target.unsqueeze(2)).sum(1).mean(1)
            # the sum of an unknown value is 0 already
            parts.append(entropy.sum() / target.sum().clamp_min(1))
    return torch.stack(parts).mean()


def _coordinates(shape: Sequence[int], like: Tensor) -> Tensor:
    """(B, D, *shape) from -1 to 1: fluid is told from muscle by where it is."""
    axes = [torch.linspace(-1, 1, n, device=like.device) if n > 1 else like.new_zeros(1) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(like), -1, *shape)


def value_targets(parents: Tensor, coding: AttributeCoding, attributes: Sequence[Attribute]) -> Tensor:
    """Which value every attribute has, for `adversarial_cross_entropy`.

    Args:
        parents: (B, coding.width) encoded attributes.
        coding: theirs.
        attributes: some of the coding's, binary or categorical ones.

    Returns:
        (B, K) with 1 at each value; all 0 for an attribute that is unknown.
    """
    parts = dict(zip((one.name for one in coding.attributes), parents.split([a.width for a in coding.attributes], 1)))
    targets = []
    for attribute in attributes:
        value, unknown = parts[attribute.name][:, :-1], parts[attribute.name][:, -1:]
        targets.append(value if attribute.kind == "categorical" else torch.cat([1 - unknown - value, value], 1))
    return torch.cat(targets, 1)


def base_rates(targets: Tensor, counts: Sequence[int]) -> Tensor:
    """(K,) how frequent every value of its attribute is among ``targets`` (B, K): what is guessed without looking."""
    sums = [part.sum(0) for part in targets.split(list(counts), 1)]
    return torch.cat([one / one.sum().clamp_min(1) for one in sums])
