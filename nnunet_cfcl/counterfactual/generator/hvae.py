"""The hierarchical variational autoencoder of images given their attributes, in 2D and 3D.

A deep structural causal model's mechanism of the image (Ribeiro et al. 2023, arXiv 2306.15764, with the sizes of arXiv
2603.17110): an encoder without attributes, and a decoder from one voxel up to the image whose every block has a latent
code z. Its prior depends on the attributes (parents) and on the prior state, which carries codes and never the image;
its posterior on the decoder's state, the encoder's features and the parents. At the finest resolutions z is the mean of
its prior.

Intensities are standardised as nnU-Net leaves them; parents are encoded by `attributes.AttributeCoding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.counterfactual.generator.gaussians import (
    discretised_gaussian_log_probability,
    gaussian_kl,
    gaussian_log_density,
)
from nnunet_cfcl.counterfactual.generator.hvae_blocks import BiasMap, ResidualBlock, group_norm, layers_of, zeroed

#: exp of it is the largest or smallest scale of a latent code or an intensity: none is ever zero or infinite.
LOG_SCALE_BOUND = 9.0
#: Log of the spread that every intensity has at least, about the grid of 8-bit images: a background that is the same
#: number everywhere would otherwise be worth any density, and all else nothing.
LOG_SCALE_FLOOR = -4.0


@dataclass(frozen=True)
class Resolution:
    """What the HVAE does at one resolution.

    Attributes:
        shape: spatial shape (D,) in voxels; it is a multiple of the next coarser one's, axis by axis.
        width: channels.
        encoder_blocks: residual blocks before the one that leads to the next coarser resolution.
        decoder_blocks: blocks with a latent code.
        latent: channels of each code.
        stochastic: False: the code is the mean of its prior.
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
        resolutions: from the finest, which has the shape of the image, to the coarsest.
        channels: of the image.
        parents: length of the encoded attributes.
        embedding: width of the parents' embedding.
        bottleneck: a block's inner width is its resolution's divided by this.
        dropout: probability in the blocks.
        bias_maps_up_to: resolutions with at most this many voxels along every axis have a learned bias map.
        likelihood: of the intensities; "discretised" for those that lie on a grid.
        bin_width, low, high: distance of the grid's points, the first and the last; used by "discretised".
        log_scale: natural logarithm of the fixed scale of the likelihood; None: the scale is learned for every voxel.
        prior: "conditional": the prior of every code is given the parents too, as the paper has it; "exogenous": it is
            not, so that codes must be distributed alike whatever the parents are, and cannot carry them.
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
                                 f"above {coarse.shape}")


def _paper_sizes() -> HVAESizes:
    shapes, widths = (224, 112, 56, 28, 14, 7, 1), (32, 64, 96, 128, 160, 192, 512)
    encoder, decoder = (2, 4, 9, 14, 14, 9, 5), (3, 5, 10, 15, 15, 10, 5)
    latent = (1, 6, 12, 18, 24, 30, 48)
    resolutions = tuple(
        Resolution((shape, shape), width, *blocks, codes, shape <= 56)
        for shape, width, blocks, codes in zip(shapes, widths, zip(encoder, decoder), latent))
    # the paper does not give its fixed scale; this is about one grey level
    return HVAESizes(resolutions, likelihood="discretised", log_scale=-math.log(100))


class Likelihood(NamedTuple):
    """A Gaussian of every voxel: mean and log of the scale, (B, C, *S), in float32 under autocast too."""

    mean: Tensor
    log_scale: Tensor


class Evidence(NamedTuple):
    """Parts of the negative evidence lower bound, in nats per voxel and channel of the image.

    Attributes:
        likelihood: of the voxels, given the codes.
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
    """The model; images (B, C, *S) have the shape of the finest resolution, parents are (B, P).

    Args:
        sizes: all sizes.
    """

    def __init__(self, sizes: HVAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)

    @classmethod
    def preset(cls, name: str) -> HVAE:
        """A model of published sizes: "paper", that of arXiv 2603.17110 for 224 x 224 images.

        Raises:
            ValueError: another name.
        """
        if name != "paper":
            raise ValueError(f"the only preset is 'paper', found '{name}'")
        return cls(_paper_sizes())

    def forward(self, images: Tensor, parents: Tensor, noise: Sequence[Tensor] | None = None) -> Evidence:
        """The evidence of images, with codes drawn from the posterior.

        Args:
            noise: of `draw_noise`; None takes the means of the posterior.
        """
        decoded = self.decoder(parents, self.encoder(images), noise)
        kl = torch.stack(decoded.kl) / images[0].numel()
        log_likelihood = self._log_likelihood(_precise(images), decoded.likelihood)
        return Evidence(decoded.likelihood, -log_likelihood.flatten(1).mean(1), kl, decoded.codes)

    def draw_noise(self, generator: Generator, count: int) -> list[Tensor]:
        """Standard normal numbers for the codes of ``count`` images, on the generator's device."""
        return [torch.randn((count, *shape), generator=generator, device=generator.device)
                for shape in self.decoder.code_shapes()]

    def decode(self, codes: Sequence[Tensor], parents: Tensor) -> Likelihood:
        """The images of these codes under other parents."""
        return cast(Decoded, self.decoder(parents, codes=codes)).likelihood

    def sample(self, parents: Tensor, noise: Sequence[Tensor]) -> Likelihood:
        """Images of these parents with codes from the prior."""
        return cast(Decoded, self.decoder(parents, noise=noise)).likelihood

    def counterfactual_changes(
        self, images: Tensor, parents: Tensor, others: Sequence[Tensor], noise: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What the interventions ``parents -> others[k]`` do to the images: one encoder pass, one decoder pass to
        abduct the codes and one for every intervention.

        Returns:
            For each intervention offset and gain, (B, C, *S), in float32 under autocast too: the counterfactual of an
            image x is offset + gain x. That is m* + sigma*/sigma (x - m), with a fixed scale x + (m* - m) (method,
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
    """Features of an image at every resolution; attributes play no part."""

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
        """Features (B, width, *shape) of every resolution, from the finest."""
        features = [self.stages[0](self.stem(images))]
        for down, stride, stage in zip(self.down, self._strides, self.stages[1:]):
            features.append(stage(self._pool(down(features[-1]), stride)))
        return features


class Decoded(NamedTuple):
    """What comes out of the decoder: ``codes`` are the stochastic ones from the coarsest, ``kl`` is (B,) in nats for
    every resolution from the finest."""

    likelihood: Likelihood
    codes: list[Tensor]
    kl: list[Tensor]


class Decoder(nn.Module):
    """From the parents, and codes or the features of an image, to the image."""

    def __init__(self, sizes: HVAESizes) -> None:
        super().__init__()
        self._sizes = sizes
        conv, _ = layers_of(sizes)
        finest, coarsest = sizes.resolutions[0], sizes.resolutions[-1]
        self.embed = nn.Sequential(
            nn.Linear(sizes.parents, sizes.embedding), nn.SiLU(), nn.Linear(sizes.embedding, sizes.embedding))
        self.start = nn.Parameter(torch.zeros(coarsest.width, *coarsest.shape))
        self.biases, self.stages = nn.ModuleList(), nn.ModuleList()
        coarse_to_fine = sizes.resolutions[::-1]
        for index, (resolution, finer) in enumerate(zip(coarse_to_fine, (*coarse_to_fine[1:], finest))):
            out = [resolution.width] * (resolution.decoder_blocks - 1) + [finer.width]
            self.stages.append(nn.ModuleList(DecoderBlock(sizes, resolution, width) for width in out))
            has_map = index > 0 and max(resolution.shape) <= sizes.bias_maps_up_to
            self.biases.append(BiasMap(resolution) if has_map else nn.Identity())
        self.norm = group_norm(finest.width)
        self.mean = conv(finest.width, sizes.channels, 1)
        self.log_scale = zeroed(conv(finest.width, sizes.channels, 1)) if sizes.log_scale is None else None

    def code_shapes(self) -> list[tuple[int, ...]]:
        """(latent, *shape) of every stochastic code, from the coarsest."""
        return [(resolution.latent, *resolution.shape) for resolution in self._sizes.resolutions[::-1]
                if resolution.stochastic for _ in range(resolution.decoder_blocks)]

    def forward(
        self,
        parents: Tensor,
        features: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
        codes: Sequence[Tensor] | None = None,
    ) -> Decoded:
        """With ``codes`` these are decoded; else they come from the posterior given ``features``, or from the prior:
        its or their mean without ``noise``."""
        embedded = self.embed(parents)
        given = iter(codes) if codes is not None else None
        random = iter(noise) if noise is not None else None
        state = prior_state = self.start.expand(len(parents), *self.start.shape)
        used: list[Tensor] = []
        kl: list[Tensor] = []
        for index, (stage, bias) in enumerate(zip(self.stages, self.biases)):
            resolution = self._sizes.resolutions[-1 - index]
            if index:
                state = bias(nn.functional.interpolate(state, resolution.shape))
                prior_state = bias(nn.functional.interpolate(prior_state, resolution.shape))
            context = embedded.view(*embedded.shape, *[1] * len(resolution.shape)).expand(-1, -1, *resolution.shape)
            image = features[-1 - index] if features is not None else None
            total = _precise(parents).new_zeros(len(parents))
            for block in cast(nn.ModuleList, stage):
                step = block(state, prior_state, context, image, given, random)
                state, prior_state, total = step.state, step.prior_state, total + step.kl
                if resolution.stochastic:
                    used.append(step.code)
            kl.insert(0, total)
        last = nn.functional.silu(self.norm(state))
        mean = _precise(self.mean(last))
        if self.log_scale is None:
            return Decoded(Likelihood(mean, torch.full_like(mean, cast(float, self._sizes.log_scale))), used, kl)
        return Decoded(Likelihood(mean, _floored(_bounded(_precise(self.log_scale(last))))), used, kl)


class Step(NamedTuple):
    """What a decoder block hands on: both states, its code and the code's divergence (B,) in nats."""

    state: Tensor
    prior_state: Tensor
    code: Tensor
    kl: Tensor


class DecoderBlock(nn.Module):
    """One code: its prior, its posterior, and what it does to the state.

    Args:
        sizes: of the model.
        resolution: of the block.
        out: width of the states it returns.
    """

    def __init__(self, sizes: HVAESizes, resolution: Resolution, out: int) -> None:
        super().__init__()
        conv, _ = layers_of(sizes)
        width, latent, context = resolution.width, resolution.latent, sizes.embedding
        self._latent, self._stochastic = latent, resolution.stochastic
        self._conditional = sizes.prior == "conditional"
        # there is nothing around a voxel to look at
        kernel = 1 if max(resolution.shape) <= 2 else 3
        self.prior = ResidualBlock(
            sizes, width + (context if self._conditional else 0), 2 * latent + width, width, kernel)
        if resolution.stochastic:
            self.posterior = ResidualBlock(sizes, 2 * width + context, 2 * latent, width, kernel)
        self.insert_code = conv(latent + context, width, 1)
        self.next_prior_state = conv(latent + width, out, 1)
        self.residual = ResidualBlock(sizes, width, out, width, kernel)

    def forward(
        self,
        state: Tensor,
        prior_state: Tensor,
        context: Tensor,
        image: Tensor | None,
        given: Iterator[Tensor] | None,
        noise: Iterator[Tensor] | None,
    ) -> Step:
        """``given`` and ``noise`` yield the stochastic codes and their noise; the states are (B, width, *shape), the
        context and the image's features likewise."""
        prior = self.prior(torch.cat([prior_state, context], 1) if self._conditional else prior_state)
        loc, log_scale, features = prior.split([self._latent, self._latent, prior.shape[1] - 2 * self._latent], 1)
        code, kl = loc, _precise(loc).new_zeros(len(loc))
        if self._stochastic and given is not None:
            code = next(given)
        elif self._stochastic:
            prior_gaussian = here = (_precise(loc), _bounded(_precise(log_scale)))
            if image is not None:
                found = _precise(self.posterior(torch.cat([state, image, context], 1))).chunk(2, 1)
                here = (found[0], _bounded(found[1]))
                kl = gaussian_kl(*here, *prior_gaussian).flatten(1).sum(1)
            code = here[0]
            if noise is not None:
                code = code + torch.exp(here[1]) * next(noise)
        code = code.to(features.dtype)
        state = state + features + self.insert_code(torch.cat([code, context.to(code.dtype)], 1))
        return Step(self.residual(state), self.next_prior_state(torch.cat([code, features], 1)), code, kl)


def _precise(x: Tensor) -> Tensor:
    """In float32 where autocast made it half: densities need that much."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _bounded(log_scale: Tensor) -> Tensor:
    """Smoothly within +- `LOG_SCALE_BOUND`, and nearly the same where it is small."""
    return LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)


def _floored(log_scale: Tensor) -> Tensor:
    """Of the sum of two independent deviations, the second of `LOG_SCALE_FLOOR`."""
    return torch.logaddexp(2 * log_scale, torch.full_like(log_scale, 2 * LOG_SCALE_FLOOR)) / 2
