"""A small network that predicts attributes from an image: judge of counterfactuals, and teacher in fine-tuning.

There are two unrelated architectures, because a generator that was fine-tuned against a network learns to fool it: the
judge must be another network (Monteiro et al. 2023, "Measuring axiomatic soundness of counterfactual image models",
arXiv 2303.01274, section 4, on pseudo-oracles).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.gate.small_training import halvings, images_per_step, shifted, train_briefly
from nnunet_cfcl.counterfactual.generator.data import Cells, Patches
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding, is_missing

Architecture = Literal["residual", "plain"]
#: Largest numbers of images and voxels in one pass without gradients.
PASS, VOXELS_PER_PASS = 16, 1 << 21


class AttributePredictor(nn.Module):
    """Classifier of binary and categorical attributes for images (N, C, *patch) of preprocessed intensities.

    Args:
        attributes: attributes to predict; continuous attributes are ignored.
        patch_size: (D,) in voxels.
        channels: number of image channels C.
        architecture: "residual" or "plain".
        scale: intensity scale of the generator.

    Raises:
        ValueError: unknown architecture.
    """

    def __init__(
        self, attributes: Sequence[Attribute], patch_size: Sequence[int], channels: int, architecture: Architecture,
        scale: IntensityScale,
    ) -> None:
        super().__init__()
        if architecture not in get_args(Architecture):
            raise ValueError(f"architecture must be one of {', '.join(get_args(Architecture))}, found '{architecture}'")
        self.attributes = tuple(attribute for attribute in attributes if attribute.kind != "continuous")
        self.scale = scale
        features = (ResidualFeatures if architecture == "residual" else PlainFeatures)(patch_size, channels)
        self.features = features
        self.head = nn.Linear(features.width, sum(len(attribute.values) for attribute in self.attributes))

    def log_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Attribute -> (N, K) log probabilities of its K values in order, differentiable."""
        logits = self.head(self.features(self.scale.to(images.device).forward(images)))
        parts = logits.split([len(attribute.values) for attribute in self.attributes], 1)
        return {attribute.name: part.log_softmax(1) for attribute, part in zip(self.attributes, parts)}

    @torch.no_grad()
    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        """Attribute -> (N,) int64 index of the most probable value, on the CPU; any number of images, on any device."""
        device = self.head.weight.device
        parts = [self.log_probabilities(part.to(device)) for part in images.split(images_per_pass(images))]
        return {attribute.name: torch.cat([part[attribute.name].argmax(1).cpu() for part in parts])
                for attribute in self.attributes}


class ResidualFeatures(nn.Module):
    """Strided residual blocks with group norm, averaged over the image: (N, C, *patch) -> (N, width).

    The skip connections are not normalised: two scanners may differ in brightness and contrast only.
    """

    def __init__(self, patch_size: Sequence[int], channels: int) -> None:
        super().__init__()
        conv = convolution(len(patch_size))
        strides = halvings(patch_size, 6, 6)
        widths = [min(96, 16 * 2**level) for level in range(max(1, len(strides)))]
        self.stem = conv(channels, widths[0], 5, stride=strides[0] if strides else 1, padding=2)
        self.blocks = nn.Sequential(*(
            ResidualBlock(before, after, stride) for before, after, stride in zip(widths, widths[1:], strides[1:])))
        self.width = widths[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(N, width) of images as the model sees them."""
        return nn.functional.silu(self.blocks(self.stem(images))).flatten(2).mean(2)


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-convolution twice, the first strided; the skip connection pools and applies a 1x1 convolution."""

    def __init__(self, width: int, out: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        conv = convolution(len(stride))
        self.layers = nn.Sequential(
            nn.GroupNorm(4, width), nn.SiLU(), conv(width, out, 3, stride=stride, padding=1),
            nn.GroupNorm(4, out), nn.SiLU(), conv(out, out, 3, padding=1))
        self.skip = nn.Sequential(_pooling(stride, "average", ceil=True), conv(width, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, *S) to (N, out, *S / stride)."""
        return cast(Tensor, self.skip(x) + self.layers(x))


class PlainFeatures(nn.Module):
    """Convolutions without stride or normalisation, alternating average and maximum pooling, one hidden layer.

    Maps (N, C, *patch) to (N, width).
    """

    width = 64

    def __init__(self, patch_size: Sequence[int], channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, after, kernel = channels, 12, 7 if len(patch_size) == 2 else 5
        for level, stride in enumerate(halvings(patch_size, 5, 6)):
            layers += [_plain(before, after, kernel, len(patch_size)), nn.LeakyReLU(0.1),
                       _pooling(stride, "maximum" if level % 2 else "average")]
            before, after, kernel = after, min(80, 2 * after), 3
        self.layers = nn.Sequential(*layers, _plain(before, after, 3, len(patch_size)), nn.LeakyReLU(0.1))
        self.hidden = nn.Sequential(nn.Linear(2 * after, self.width), nn.LeakyReLU(0.1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, width) of images as the model sees them."""
        flat = self.layers(images).flatten(2)
        return cast(Tensor, self.hidden(torch.cat([flat.mean(2), flat.amax(2)], 1)))


def images_per_pass(images: Tensor) -> int:
    """Number of images (N, C, *S) in one pass without gradients."""
    return max(1, min(PASS, VOXELS_PER_PASS // images.shape[2:].numel()))


def convolution(dim: int) -> Callable[..., nn.Module]:
    """Convolution layer for 2 or 3 spatial axes."""
    return nn.Conv2d if dim == 2 else nn.Conv3d


def _plain(before: int, after: int, kernel: int, dim: int) -> nn.Module:
    layer = convolution(dim)(before, after, kernel, padding=kernel // 2)
    # without normalisation the initialisation must preserve the variance
    nn.init.kaiming_normal_(cast(Tensor, layer.weight), 0.1)
    return layer


def _pooling(stride: tuple[int, ...], by: Literal["maximum", "average"], ceil: bool = False) -> nn.Module:
    kinds: dict[tuple[str, int], Callable[..., nn.Module]] = {
        ("average", 2): nn.AvgPool2d, ("average", 3): nn.AvgPool3d,
        ("maximum", 2): nn.MaxPool2d, ("maximum", 3): nn.MaxPool3d}
    return kinds[by, len(stride)](stride, ceil_mode=ceil)


def value_indices(attribute: Attribute, cells: Sequence[Cells]) -> Tensor:
    """Index (N,) int64 of every case's value in ``attribute.values``, -1 for unknown values.

    Raises:
        UserError: a value is not among the attribute's values.
    """
    return torch.tensor([_value_index(attribute, one.get(attribute.name, "")) for one in cells], dtype=torch.long)


def _value_index(attribute: Attribute, cell: str) -> int:
    if is_missing(cell):
        return -1
    if cell not in attribute.values:
        attribute.encode(cell)  # raises the error
    return attribute.values.index(cell)


def attribute_loss(found: Mapping[str, Tensor], known: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy, summed over the attributes and averaged over the images; unknown values are ignored.

    Args:
        found: attribute -> (N, K) log probabilities.
        known: attribute -> (N,) int64 true values, -1 if unknown.
        weights: attribute -> (K,) weight of every value, see `value_weights`.
    """
    parts = [nn.functional.nll_loss(found[name], values, weights[name], ignore_index=-1, reduction="sum")
             for name, values in known.items()]
    return torch.stack(parts).sum() / len(next(iter(known.values())))


def value_weights(values: Tensor, count: int) -> Tensor:
    """Class weights (K,) that balance all values that occur, with mean 1 over the known cases.

    Args:
        values: (N,) int64, -1 if unknown.
        count: number of values K.
    """
    cases = torch.bincount(values[values >= 0], minlength=count).float()
    return torch.where(cases > 0, cases.sum() / (cases.clamp_min(1) * (cases > 0).sum().clamp_min(1)), 0.0)


def train_predictor(
    patches: Patches, coding: AttributeCoding, architecture: Architecture, steps: int, seed: int,
    device: torch.device | str, scale: IntensityScale,
) -> AttributePredictor:
    """Train a predictor of the binary and categorical attributes on patches; reproducible.

    Images are shifted for augmentation; their intensities, which distinguish scanners, are not changed. Classes are
    balanced by weights.

    Args:
        patches: patches of training patients.
        coding: encoding of the attributes.
        architecture: "residual" or "plain".
        steps: number of optimiser steps.
        seed: seed of the initialisation and of all draws.
        device: device of the training and of the trained predictor.
        scale: intensity scale of the generator.

    Raises:
        ValueError: no attribute is binary or categorical.
    """
    attributes = [attribute for attribute in coding.attributes if attribute.kind != "continuous"]
    if not attributes:
        raise ValueError("there is no binary or categorical attribute to predict")
    device = torch.device(device)
    size = tuple(patches.images.shape[2:])
    known = {attribute.name: value_indices(attribute, patches.cells) for attribute in attributes}
    weights = {attribute.name: value_weights(known[attribute.name], len(attribute.values)).to(device)
               for attribute in attributes}

    def loss_of(network: AttributePredictor, chosen: Tensor, shares: Tensor) -> Tensor:
        images = shifted(patches.images[chosen].to(device), shares)
        truth = {name: values[chosen].to(device) for name, values in known.items()}
        return attribute_loss(network.log_probabilities(images), truth, weights)

    return train_briefly(
        lambda: AttributePredictor(attributes, size, patches.images.shape[1], architecture, scale),
        len(patches), loss_of, steps, images_per_step(size), len(size), seed, device)


def balanced(shares: Mapping[int, float]) -> float | None:
    """Mean over the values; None for fewer than two values."""
    return sum(shares.values()) / len(shares) if len(shares) > 1 else None


def accuracy_by_value(predicted: Tensor, values: Tensor) -> dict[int, float]:
    """Value -> fraction of its cases (N,) that are predicted correctly; -1 is unknown and ignored."""
    return {int(value): float((predicted[values == value] == value).float().mean())
            for value in values[values >= 0].unique()}
