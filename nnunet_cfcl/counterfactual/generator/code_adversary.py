"""Adversary that predicts the attributes from an image's codes, so that the codes are trained not to carry them.

An intervention cannot change attributes that the codes carry: if the codes identify the scanner, the decoder takes it
from there and ignores the parents (method, section 1). A prior without parents does not prevent this: one bit in a
coarse code suffices and costs almost nothing. The adversary penalises it (Lample et al. 2017, "Fader networks", arXiv
1706.00409).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding

WIDTH = 32


class CodeAdversary(nn.Module):
    """Attribute classifier of the codes, coarse to fine; it predicts at every position and for the whole image.

    Args:
        sizes: sizes of the HVAE.
        attributes: binary or categorical attributes to predict.
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
        """Compute logits at every resolution: (B, K, M) at M positions and (B, K, 1) of the whole image.

        K is the number of values of all attributes.

        Args:
            codes: codes of `Evidence.codes`, from the coarsest.
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
    """Cross entropy averaged over attributes, heads and positions, in nats; unknown values are ignored.

    Args:
        logits: (B, K, M) of every head of an adversary.
        targets: (B, K) probabilities of the values, attribute by attribute; all 0 for an unknown attribute.
        counts: number of values of every attribute, K in total.
    """
    parts = []
    for one in logits:
        for guess, target in zip(one.split(list(counts), 1), targets.split(list(counts), 1)):
            entropy = -(torch.log_softmax(guess, 1) * target.unsqueeze(2)).sum(1).mean(1)
            # the entropy of an unknown value is 0 already
            parts.append(entropy.sum() / target.sum().clamp_min(1))
    return torch.stack(parts).mean()


def _coordinates(shape: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates (B, D, *shape) from -1 to 1: the meaning of a code depends on its position."""
    axes = [torch.linspace(-1, 1, n, device=like.device) if n > 1 else like.new_zeros(1) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(like), -1, *shape)


def value_targets(parents: Tensor, coding: AttributeCoding, attributes: Sequence[Attribute]) -> Tensor:
    """Convert encoded attributes to one-hot targets for `adversarial_cross_entropy`.

    Args:
        parents: (B, coding.width) encoded attributes.
        coding: encoding of ``parents``.
        attributes: binary or categorical attributes of the coding.

    Returns:
        (B, K), 1 at the value of each attribute; all 0 for an unknown attribute.
    """
    parts = dict(zip((one.name for one in coding.attributes), parents.split([a.width for a in coding.attributes], 1)))
    targets = []
    for attribute in attributes:
        value, unknown = parts[attribute.name][:, :-1], parts[attribute.name][:, -1:]
        targets.append(value if attribute.kind == "categorical" else torch.cat([1 - unknown - value, value], 1))
    return torch.cat(targets, 1)


def base_rates(targets: Tensor, counts: Sequence[int]) -> Tensor:
    """Relative frequency (K,) of every value within its attribute, from ``targets`` (B, K)."""
    sums = [part.sum(0) for part in targets.split(list(counts), 1)]
    return torch.cat([one / one.sum().clamp_min(1) for one in sums])
