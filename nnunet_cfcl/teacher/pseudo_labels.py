"""Pseudo-labels: what the teacher is certain of, and which of its classes may be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PseudoLabels(NamedTuple):
    """Labels that are known in some voxels.

    Attributes:
        labels: (N, 1, *S) int64 classes; with regions (N, R, *S) bool.
        known: bool, of the same shape.
    """

    labels: Tensor
    known: Tensor

    def at(self, shape: Sequence[int]) -> PseudoLabels:
        """The labels at another resolution (nearest voxel), for the outputs of deep supervision."""
        if tuple(self.labels.shape[2:]) == tuple(shape):
            return self
        return PseudoLabels(*(F.interpolate(one.float(), tuple(shape), mode="nearest-exact").to(one.dtype)
                              for one in self))


def pseudo_labels(logits: Sequence[Tensor], confidence: float, regions: bool = False) -> PseudoLabels:
    """Label voxels by the mean prediction of several versions of the same patches.

    A voxel is known where the mean probability of its class is at least ``confidence`` and all versions have the same
    class (FixMatch, arXiv 2001.07685, equation 4). With regions every region is a label of its own, known where its
    mean probability is at least ``confidence`` or at most 1 - ``confidence`` and all versions agree.

    Args:
        logits: (N, H, *S) of every version.
        confidence: tau, in [0.5, 1].
        regions: whether the network predicts regions.
    """
    mean = torch.stack([probabilities(one, regions) for one in logits]).mean(0)
    if regions:
        labels = mean > 0.5
        certain = (mean >= confidence) | (mean <= 1 - confidence)
        votes = [one > 0 for one in logits]
    else:
        highest, labels = mean.max(1, keepdim=True)
        certain = highest >= confidence
        votes = [one.argmax(1, keepdim=True) for one in logits]
    for vote in votes:
        certain = certain & (vote == labels)
    return PseudoLabels(labels, certain)


def probabilities(logits: Tensor, regions: bool = False) -> Tensor:
    """(N, H, *S) float32 probabilities of classes or regions."""
    return logits.float().sigmoid() if regions else logits.float().softmax(1)


def from_target(target: Tensor, ignore_label: int | None, regions: bool = False) -> PseudoLabels:
    """Convert nnU-Net's target of labelled images, known everywhere but at the ignore label.

    Args:
        target: (N, 1, *S) classes; with regions (N, R, *S), and with an ignore label one more channel that marks it.
        ignore_label: label that marks unlabelled voxels; None: there is none.
        regions: whether the network predicts regions.
    """
    if not regions:
        known = torch.ones_like(target, dtype=torch.bool) if ignore_label is None else target != ignore_label
        return PseudoLabels(target.long().masked_fill(~known, 0), known)
    labels = target.bool()
    if ignore_label is None:
        return PseudoLabels(labels, torch.ones_like(labels))
    return PseudoLabels(labels[:, :-1], ~labels[:, -1:].expand_as(labels[:, :-1]))


def disagreement(found: Tensor, pseudo: PseudoLabels, regions: bool = False) -> Tensor:
    """Share of the known foreground, in either, where prediction and pseudo-label differ; 0 without any.

    Args:
        found: (N, H, *S) logits.
        pseudo: labels of the same patches.
        regions: whether the network predicts regions.

    Returns:
        Scalar in [0, 1].
    """
    voted = found > 0 if regions else found.argmax(1, keepdim=True)
    foreground = ((voted > 0) | (pseudo.labels > 0)) & pseudo.known
    differing = foreground & (voted != pseudo.labels)
    return differing.sum() / foreground.sum().clamp_min(1)


def shares(labels: Tensor, known: Tensor, heads: int, regions: bool = False) -> Tensor:
    """Share (heads,) of every class or region among the known voxels; 0 where nothing is known."""
    if regions:
        axes = [0, *range(2, labels.ndim)]
        return (labels & known).sum(axes) / known.sum(axes).clamp_min(1)
    counts = torch.bincount(labels[known].flatten(), minlength=heads)[:heads]
    return counts / counts.sum().clamp_min(1)


def trusted(labels: Tensor, known: Tensor, trust: Tensor, regions: bool = False) -> Tensor:
    """Weights in [0, 1] of the voxels: the trust (heads,) in their label where it is known, 0 elsewhere.

    With regions a voxel outside of a region is trusted fully.
    """
    if regions:
        shaped = trust.reshape(1, -1, *[1] * (labels.ndim - 2))
        return known * torch.where(labels, shaped, torch.ones_like(shaped))
    return known * trust[labels]


class ClassShares:
    """Moving averages of the classes' shares of the pseudo-labels, compared with those of the manual labels.

    A class is within its bounds from `LEAST` to `MOST` times its share of the manual labels. A teacher that is wrong
    confirms its own mistakes: beyond `MOST` the class's pseudo-labels weigh less.

    Args:
        expected: (heads,) shares of the manual labels.
        first: index of the first class that is watched: 1 leaves the background out, 0 watches every region.
    """

    MOST, LEAST, DECAY = 2.0, 0.1, 0.98

    def __init__(self, expected: Tensor, first: int) -> None:
        self.expected, self.first = expected.double().cpu(), first
        self.found: Tensor = self.expected.clone()

    def update(self, found: Tensor) -> None:
        """Add the shares (heads,) of a step."""
        self.found = torch.lerp(found.double().cpu(), self.found, self.DECAY)

    @property
    def ratios(self) -> Tensor:
        """(heads,) shares relative to the manual labels'; 1 for classes that these lack, and for the background."""
        watched = (self.expected > 0) & (torch.arange(len(self.expected)) >= self.first)
        return torch.where(watched, self.found / self.expected.clamp_min(1e-12), torch.ones(()).double())

    @property
    def trust(self) -> Tensor:
        """(heads,) weights of the classes' pseudo-labels in (0, 1]; 1 up to `MOST` times the manual share."""
        return (self.MOST / self.ratios.clamp_min(self.MOST)).float()

    def outside(self) -> list[tuple[int, float]]:
        """Indices and ratios of the classes beyond their bounds."""
        return [(index, ratio) for index, ratio in enumerate(self.ratios.tolist())
                if not self.LEAST <= ratio <= self.MOST]
