"""The generator's adversarial losses, and the updates of both adversaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.generator.code_adversary import (
    CodeAdversary,
    adversarial_cross_entropy,
    base_rates,
    value_targets,
)
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes
from nnunet_cfcl.counterfactual.generator.image_adversary import ImageAdversary
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding


class Adversaries(nn.ModuleList):
    """Code adversary and image adversary; `hide` and `convince` compute their gradients and the generator's losses.

    Args:
        sizes: sizes of the HVAE.
        coding: encoding of the attributes.
        changed: binary or categorical attributes that some intervention changes.
        parents: (N, coding.width) encoded attributes of all training cases.
    """

    rates: Tensor

    def __init__(
        self, sizes: HVAESizes, coding: AttributeCoding, changed: Sequence[Attribute], parents: Tensor
    ) -> None:
        super().__init__([CodeAdversary(sizes, changed),
                          ImageAdversary(sizes.resolutions[0].shape, sizes.channels, changed)])
        self.coding, self.changed = coding, tuple(changed)
        self.counts = [len(attribute.values) for attribute in changed]
        self.register_buffer("rates", base_rates(self.values(parents), self.counts), persistent=False)
        parts = self.rates.split(self.counts)
        #: mean entropy of the attributes in nats: the loss of an adversary at chance level
        self.guessing = float(torch.stack([torch.special.entr(part).sum() for part in parts]).mean())

    def hide(self, codes: Sequence[Tensor], parents: Tensor, share: float) -> tuple[Tensor, float]:
        """Loss that removes the attributes from the codes; adds the code adversary's gradients to its parameters.

        Args:
            codes: codes of `Evidence.codes`.
            parents: (B, coding.width), of the same images.
            share: weight of these images' gradients.

        Returns:
            The attribute information in the codes, in nats above chance level, differentiable; and the code adversary's
            own loss relative to chance level.
        """
        adversary = self[0]
        own = self._entropy(adversary([code.detach() for code in codes]), self.values(parents))
        (share * own).backward()
        with _frozen(adversary):
            confused = self._entropy(adversary(codes), self.rates.expand(len(parents), -1))
        return confused - self.guessing, float(own.detach()) / self.guessing

    def convince(
        self, means: Tensor, counterfactuals: Tensor, parents: Tensor, others: Tensor, share: float
    ) -> tuple[Tensor, float]:
        """Loss that makes counterfactuals match their new attributes; adds the image adversary's gradients.

        Args:
            means: (B, C, *S), decoded with the images' own parents.
            counterfactuals: (B, C, *S), decoded from the same codes with ``others``.
            parents, others: (B, coding.width).
            share: weight of these images' gradients.

        Returns:
            The adversary's cross entropy of the new attributes on the counterfactuals, in nats, differentiable; and the
            image adversary's own loss relative to chance level.
        """
        adversary, true = self[1], self.values(parents)
        seen = adversary(torch.cat([means.detach(), counterfactuals.detach()]))
        own = self._entropy(seen, torch.cat([true, true]))
        (share * own).backward()
        with _frozen(adversary):
            disbelief = self._entropy(adversary(counterfactuals), self.values(others))
        return disbelief, float(own.detach()) / self.guessing

    def values(self, parents: Tensor) -> Tensor:
        """One-hot values (B, K) of the changed attributes, see `value_targets`."""
        return value_targets(parents, self.coding, self.changed)

    def _entropy(self, logits: Sequence[Tensor], targets: Tensor) -> Tensor:
        return adversarial_cross_entropy([one.float() for one in logits], targets, self.counts)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Freeze the network's parameters; gradients still reach its input."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)
