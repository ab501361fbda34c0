"""Decoder of the HVAE: priors, posteriors and codes from one voxel up to the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.generator.gaussians import gaussian_kl
from nnunet_cfcl.counterfactual.generator.hvae_blocks import BiasMap, ResidualBlock, group_norm, layers_of, zeroed
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution

#: Bound of the log scales of codes and intensities, so that no scale is ever zero or infinite.
LOG_SCALE_BOUND = 9.0
#: Log of the smallest scale of an intensity, about the step of 8-bit images: on a constant background the density would
#: otherwise grow without bound and dominate the loss.
LOG_SCALE_FLOOR = -4.0


class Likelihood(NamedTuple):
    """Gaussian of every voxel: mean and log scale, (B, C, *S) each, in float32 under autocast too."""

    mean: Tensor
    log_scale: Tensor


class Decoded(NamedTuple):
    """Output of the decoder.

    Attributes:
        likelihood: Gaussian of every voxel.
        codes: the stochastic codes, from the coarsest.
        kl: divergence of the codes (B,) in nats for every resolution, from the finest.
    """

    likelihood: Likelihood
    codes: list[Tensor]
    kl: list[Tensor]


class Decoder(nn.Module):
    """Decode parents and codes, which are given or inferred from an image's features, into an image."""

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
        """Shapes (latent, *shape) of the stochastic codes, from the coarsest."""
        return [(resolution.latent, *resolution.shape) for resolution in self._sizes.resolutions[::-1]
                if resolution.stochastic for _ in range(resolution.decoder_blocks)]

    def forward(
        self,
        parents: Tensor,
        features: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
        codes: Sequence[Tensor] | None = None,
    ) -> Decoded:
        """Decode the given codes, or codes of the posterior (with ``features``) or of the prior (without).

        Args:
            parents: (B, P) encoded attributes.
            features: features of an image from `Encoder`, from the finest.
            noise: standard normal noise of the codes, from `HVAE.draw_noise`; None: the mean of every code.
            codes: stochastic codes to decode, from the coarsest.
        """
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
            total = full_precision(parents).new_zeros(len(parents))
            for block in cast(nn.ModuleList, stage):
                step = block(state, prior_state, context, image, given, random)
                state, prior_state, total = step.state, step.prior_state, total + step.kl
                if resolution.stochastic:
                    used.append(step.code)
            kl.insert(0, total)
        last = nn.functional.silu(self.norm(state))
        mean = full_precision(self.mean(last))
        if self.log_scale is None:
            return Decoded(Likelihood(mean, torch.full_like(mean, cast(float, self._sizes.log_scale))), used, kl)
        return Decoded(Likelihood(mean, _floored(_bounded(full_precision(self.log_scale(last))))), used, kl)


class Step(NamedTuple):
    """Output of a decoder block: both states, the code and its divergence (B,) in nats."""

    state: Tensor
    prior_state: Tensor
    code: Tensor
    kl: Tensor


class DecoderBlock(nn.Module):
    """One latent code: its prior, its posterior and its effect on the state.

    Args:
        sizes: sizes of the model.
        resolution: resolution of the block.
        out: width of the returned states.
    """

    def __init__(self, sizes: HVAESizes, resolution: Resolution, out: int) -> None:
        super().__init__()
        conv, _ = layers_of(sizes)
        width, latent, context = resolution.width, resolution.latent, sizes.embedding
        self._latent, self._stochastic = latent, resolution.stochastic
        self._conditional = sizes.prior == "conditional"
        # on one or two voxels a wider kernel would read padding only
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
        """Update both states with one code.

        Args:
            state, prior_state: (B, width, *shape).
            context: (B, embedding, *shape), the embedded parents.
            image: (B, width, *shape), the encoder's features; None: the code comes from the prior.
            given: iterator over given stochastic codes; None: the code is inferred.
            noise: iterator over the codes' noise; None: the mean of the code.
        """
        prior = self.prior(torch.cat([prior_state, context], 1) if self._conditional else prior_state)
        loc, log_scale, features = prior.split([self._latent, self._latent, prior.shape[1] - 2 * self._latent], 1)
        code, kl = loc, full_precision(loc).new_zeros(len(loc))
        if self._stochastic and given is not None:
            code = next(given)
        elif self._stochastic:
            prior_gaussian = here = (full_precision(loc), _bounded(full_precision(log_scale)))
            if image is not None:
                found = full_precision(self.posterior(torch.cat([state, image, context], 1))).chunk(2, 1)
                here = (found[0], _bounded(found[1]))
                kl = gaussian_kl(*here, *prior_gaussian).flatten(1).sum(1)
            code = here[0]
            if noise is not None:
                code = code + torch.exp(here[1]) * next(noise)
        code = code.to(features.dtype)
        state = state + features + self.insert_code(torch.cat([code, context.to(code.dtype)], 1))
        return Step(self.residual(state), self.next_prior_state(torch.cat([code, features], 1)), code, kl)


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors of autocast as float32, which densities need; others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _bounded(log_scale: Tensor) -> Tensor:
    """Soft clamp to +- `LOG_SCALE_BOUND`, close to the identity around 0."""
    return LOG_SCALE_BOUND * torch.tanh(log_scale / LOG_SCALE_BOUND)


def _floored(log_scale: Tensor) -> Tensor:
    """Log scale of a sum of two independent Gaussians, the second with `LOG_SCALE_FLOOR`."""
    return torch.logaddexp(2 * log_scale, torch.full_like(log_scale, 2 * LOG_SCALE_FLOOR)) / 2
