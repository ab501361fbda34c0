"""Hierarchical variational autoencoder (HVAE) of images given their attributes, in 2D and 3D.

The image's mechanism of a deep structural causal model (Ribeiro et al. 2023, arXiv 2306.15764, with the sizes of arXiv
2603.17110): an encoder without attributes, and a decoder from one voxel up to the image with a latent code z in every
block. The prior of z depends on the attributes (parents) and on the prior state, which carries codes and never the
image; the posterior depends on the decoder's state, the encoder's features and the parents. At the finest resolutions z
is the mean of its prior.

Images are standardised intensities (`generator.IntensityScale`); parents are encoded by `attributes.AttributeCoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.counterfactual.generator.gaussians import discretised_gaussian_log_probability, gaussian_log_density
from nnunet_cfcl.counterfactual.generator.hvae_blocks import ResidualBlock, layers_of
from nnunet_cfcl.counterfactual.generator.hvae_decoder import Decoded, Decoder, Likelihood, full_precision
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, paper_sizes


class Evidence(NamedTuple):
    """Terms of the negative evidence lower bound, in nats per voxel and channel of the image.

    Attributes:
        likelihood: Gaussian of every voxel, given the codes.
        nll: (B,) negative log likelihood.
        kl: (R, B) divergence of the codes from their priors at every resolution, from the finest; 0 where the codes are
            not stochastic.
        codes: the stochastic codes, from the coarsest.
    """

    likelihood: Likelihood
    nll: Tensor
    kl: Tensor
    codes: list[Tensor]


class HVAE(nn.Module):
    """Conditional hierarchical VAE; images (B, C, *S) have the shape of the finest resolution, parents are (B, P).

    Args:
        sizes: sizes of the model.
    """

    def __init__(self, sizes: HVAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)

    @classmethod
    def preset(cls, name: str) -> HVAE:
        """Build a model of published sizes: "paper" is the model of arXiv 2603.17110 for 224 x 224 images.

        Raises:
            ValueError: unknown name.
        """
        if name != "paper":
            raise ValueError(f"the only preset is 'paper', found '{name}'")
        return cls(paper_sizes())

    def forward(self, images: Tensor, parents: Tensor, noise: Sequence[Tensor] | None = None) -> Evidence:
        """Compute the evidence of images, with codes from the posterior.

        Args:
            images: (B, C, *S).
            parents: (B, P).
            noise: noise of `draw_noise`; None: the mean of the posterior.
        """
        decoded = self.decoder(parents, self.encoder(images), noise)
        kl = torch.stack(decoded.kl) / images[0].numel()
        log_likelihood = self._log_likelihood(full_precision(images), decoded.likelihood)
        return Evidence(decoded.likelihood, -log_likelihood.flatten(1).mean(1), kl, decoded.codes)

    def draw_noise(self, generator: Generator, count: int) -> list[Tensor]:
        """Draw standard normal noise for the codes of ``count`` images, on the random generator's device."""
        return [torch.randn((count, *shape), generator=generator, device=generator.device)
                for shape in self.decoder.code_shapes()]

    def decode(self, codes: Sequence[Tensor], parents: Tensor) -> Likelihood:
        """Decode codes with (other) parents."""
        return cast(Decoded, self.decoder(parents, codes=codes)).likelihood

    def sample(self, parents: Tensor, noise: Sequence[Tensor]) -> Likelihood:
        """Sample images of given parents, with codes from the prior."""
        return cast(Decoded, self.decoder(parents, noise=noise)).likelihood

    def counterfactual_changes(
        self, images: Tensor, parents: Tensor, others: Sequence[Tensor], noise: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the effect of the interventions ``parents -> others[k]`` on images.

        Abduction takes one encoder and one decoder pass, prediction one decoder pass per intervention.

        Args:
            images: (B, C, *S).
            parents: (B, P), the images' own.
            others: (B, P) for each intervention.
            noise: noise of `draw_noise` for a sample of the posterior; None: its mean.

        Returns:
            Offset and gain of every intervention, (B, C, *S) each, in float32 under autocast too: the counterfactual of
            an image x is offset + gain x. This is m* + sigma*/sigma (x - m), with a fixed scale x + (m* - m) (method,
            section 1); the gain is sigma*/sigma.
        """
        before = cast(Decoded, self.decoder(parents, self.encoder(images), noise))
        changes = []
        for parents_after in others:
            after = self.decode(before.codes, parents_after)
            gain = torch.exp(after.log_scale - before.likelihood.log_scale)
            changes.append((after.mean - gain * before.likelihood.mean, gain))
        return changes

    def _log_likelihood(self, images: Tensor, likelihood: Likelihood) -> Tensor:
        if self.sizes.likelihood == "continuous":
            return gaussian_log_density(images, *likelihood)
        return discretised_gaussian_log_probability(
            images, *likelihood, self.sizes.bin_width, self.sizes.low, self.sizes.high)


class Encoder(nn.Module):
    """Features of an image at every resolution, independent of its attributes."""

    def __init__(self, sizes: HVAESizes) -> None:
        super().__init__()
        conv, self._pool = layers_of(sizes)
        self.stem = conv(sizes.channels, sizes.resolutions[0].width, 7, padding=3)
        self.stages, self.down = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in zip(sizes.resolutions, (*sizes.resolutions[1:], None)):
            blocks = [ResidualBlock(sizes, fine.width, fine.width, fine.width) for _ in range(fine.encoder_blocks)]
            self.stages.append(nn.Sequential(*blocks))
            if coarse is not None:
                self.down.append(ResidualBlock(sizes, fine.width, coarse.width, fine.width))
        self._strides = [tuple(n // m for n, m in zip(fine.shape, coarse.shape))
                         for fine, coarse in zip(sizes.resolutions, sizes.resolutions[1:])]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, width, *shape) at every resolution, from the finest."""
        features = [self.stages[0](self.stem(images))]
        for down, stride, stage in zip(self.down, self._strides, self.stages[1:]):
            features.append(stage(self._pool(down(features[-1]), stride)))
        return features
