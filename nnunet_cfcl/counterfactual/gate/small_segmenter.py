"""A small segmentation network that measures whether counterfactuals preserve the anatomy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.gate.attribute_predictor import convolution, images_per_pass
from nnunet_cfcl.counterfactual.gate.small_training import halvings, images_per_step, shifted, train_briefly
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale


class SmallSegmenter(nn.Module):
    """A U-Net of few channels (Ronneberger et al. 2015, arXiv 1505.04597) for images (N, C, *patch).

    It works at half resolution, which suffices to detect a displaced organ and costs an eighth in 3D.

    Args:
        labels: label values to segment, ascending.
        patch_size: (D,) in voxels.
        channels: number of image channels C.
        scale: intensity scale of the generator.
    """

    def __init__(
        self, labels: Sequence[int], patch_size: Sequence[int], channels: int, scale: IntensityScale
    ) -> None:
        super().__init__()
        self.labels, self.scale, dim = tuple(labels), scale, len(patch_size)
        first, *self._strides = halvings(patch_size, 6, 5) or [(1,) * dim]
        widths = [min(64, 12 * 2**level) for level in range(len(self._strides) + 1)]
        self.stem = convolution(dim)(channels, widths[0], 5, stride=first, padding=2)
        self.down = nn.ModuleList(_stage(before, after, dim) for before, after in zip([widths[0], *widths], widths))
        self.up = nn.ModuleList(
            _stage(deep + here, here, dim) for here, deep in zip(widths[-2::-1], widths[:0:-1]))
        self.last = convolution(dim)(widths[0], len(self.labels), 1)
        self._pool = nn.functional.avg_pool2d if dim == 2 else nn.functional.avg_pool3d
        self._smooth = "bilinear" if dim == 2 else "trilinear"

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, K, *patch) of the K labels."""
        x = self.down[0](self.stem(self.scale.to(images.device).forward(images)))
        passed = [x]
        for stride, stage in zip(self._strides, list(self.down)[1:]):
            x = stage(self._pool(x, stride))
            passed.append(x)
        for stage, beside in zip(self.up, passed[-2::-1]):
            x = stage(torch.cat([nn.functional.interpolate(x, beside.shape[2:]), beside], 1))
        return nn.functional.interpolate(cast(Tensor, self.last(x)), images.shape[2:], mode=self._smooth)

    @torch.no_grad()
    def segment(self, images: Tensor) -> Tensor:
        """Segment any number of images on any device into int16 label maps (N, *patch), on the CPU."""
        device, table = cast(Tensor, self.last.weight).device, torch.tensor(self.labels, dtype=torch.int16)
        parts = images.split(images_per_pass(images))
        return torch.cat([table[self(part.to(device)).argmax(1).cpu()] for part in parts])


def _stage(before: int, after: int, dim: int) -> nn.Module:
    conv = convolution(dim)
    layers = [layer for width in (before, after)
              for layer in (conv(width, after, 3, padding=1), nn.GroupNorm(4, after), nn.LeakyReLU(0.1))]
    return nn.Sequential(*layers)


def train_segmenter(
    patches: Patches, steps: int, seed: int, device: torch.device | str, scale: IntensityScale
) -> SmallSegmenter | None:
    """Train a segmenter on the patches with labels; reproducible.

    Args:
        patches: patches of training patients, from all groups of the counterfactuals.
        steps: number of optimiser steps.
        seed: seed of the initialisation and of all draws.
        device: device of the training and of the trained segmenter.
        scale: intensity scale of the generator.

    Returns:
        The segmenter; None if fewer than two labels occur.
    """
    if patches.labels is None:
        return None
    with_labels = (patches.labels >= 0).flatten(1).any(1).nonzero()[:, 0]
    images, maps = patches.images[with_labels], patches.labels[with_labels].long()
    labels = [int(value) for value in maps.unique() if value >= 0]
    if len(labels) < 2:
        return None
    device, size = torch.device(device), tuple(images.shape[2:])
    # searchsorted maps -1 to 0, the index of the first label: restore it
    targets = torch.searchsorted(torch.tensor(labels), maps).masked_fill_(maps < 0, -1)

    def loss_of(network: SmallSegmenter, chosen: Tensor, shares: Tensor) -> Tensor:
        inputs = shifted(images[chosen].to(device), shares)
        truth = shifted(targets[chosen, None].to(device), shares)[:, 0]
        return segmentation_loss(network(inputs), truth)

    return train_briefly(
        lambda: SmallSegmenter(labels, size, images.shape[1], scale),
        len(images), loss_of, steps, images_per_step(size), len(size), seed, device)


def segmentation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy plus 1 - soft Dice, averaged over all labels but the first and computed over the whole batch.

    Args:
        logits: (N, K, *S).
        truth: (N, *S) int64 in [0, K), -1 for unlabelled voxels.
    """
    known = (truth >= 0).unsqueeze(1)
    target = nn.functional.one_hot(truth.clamp_min(0), logits.shape[1]).movedim(-1, 1) * known
    log_probabilities = logits.log_softmax(1)
    cross_entropy = -(target * log_probabilities).sum() / known.sum().clamp_min(1)
    found = (log_probabilities.exp() * known).transpose(0, 1).flatten(1)
    both = target.transpose(0, 1).flatten(1)
    dice = (2 * (found * both).sum(1) + 1) / (found.sum(1) + both.sum(1) + 1)
    return cross_entropy + 1 - dice[1:].mean()


def dice_scores(found: Tensor, truth: Tensor, labels: Sequence[int]) -> Tensor:
    """Dice (N,) of every image, averaged over the ``labels`` in its reference; NaN without any.

    Args:
        found: (N, *S) predicted label maps.
        truth: (N, *S) reference label maps; voxels below 0 are unlabelled and ignored.
        labels: labels to evaluate.
    """
    known = truth >= 0
    scores = []
    for label in labels:
        one, other = ((found == label) & known).flatten(1), (truth == label).flatten(1)
        size = other.sum(1)
        score = 2 * (one & other).sum(1) / (one.sum(1) + size).clamp_min(1)
        scores.append(torch.where(size > 0, score, torch.nan))
    return torch.stack(scores).nanmean(0)
