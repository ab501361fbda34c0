"""nnU-Net's own loss, as its trainer builds it, on label maps as stored."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn


@dataclass(frozen=True)
class NnUNetLoss:
    """A trainer's loss, preceded by the label transforms of its data loading; picklable.

    Args:
        loss: (logits, target) -> scalar, under deep supervision of lists of both.
        regions: labels of every region where the network predicts regions, the ignore label last; None for classes.
        scales: deep-supervision scales, (D,) per output, the first 1; None without deep supervision.
    """

    loss: nn.Module
    regions: tuple[tuple[int, ...], ...] | None
    scales: tuple[tuple[float, ...], ...] | None

    def __call__(self, logits: Any, labels: Tensor) -> Tensor:
        """Compute the scalar loss.

        Args:
            logits: (N, K, *patch), or a list from full to lowest resolution under deep supervision.
            labels: (N, 1, *patch) integers as stored: -1 outside of the image, which is background to nnU-Net, and the
                ignore label.
        """
        value: Tensor = self.loss(logits, self.target(labels))
        return value

    def target(self, labels: Tensor) -> Tensor | list[Tensor]:
        """Transform label maps to the loss's target: classes (N, 1, ...) or regions (N, R, ...) bool; a list under deep
        supervision."""
        # nnU-Net's transforms take one sample: here the batch goes through them as its channels
        known = RemoveLabelTransform(-1, 0)(segmentation=labels[:, 0].clone())["segmentation"]
        classes = [known] if self.regions is None else [_isin(known, region) for region in self.regions]
        target = torch.stack(classes, dim=1)
        if self.scales is None:
            return target
        downsample = DownsampleSegForDSTransform([list(scale) for scale in self.scales])
        levels = downsample(segmentation=target.flatten(0, 1))["segmentation"]
        return [level.unflatten(0, target.shape[:2]) for level in levels]


def segmentation_loss(trainer: nnUNetTrainer) -> NnUNetLoss:
    """Build the loss that a trainer trains with, for label maps (N, 1, *patch).

    The trainer's own ``_build_loss`` is called, so that a subclass's loss is used, but without communication between
    processes (gradients are summed elsewhere) and not compiled (to be picklable).

    Args:
        trainer: an nnU-Net trainer; its network is not needed.
    """
    alone = copy.copy(trainer)
    alone.is_ddp, alone._do_i_compile = False, lambda: False
    scales = alone._get_deep_supervision_scales()
    labels, regions = trainer.label_manager, None
    if labels.has_regions:
        ignored = [] if labels.ignore_label is None else [labels.ignore_label]
        regions = tuple(labels_of(region) for region in [*labels.foreground_regions, *ignored])
    levels = None if scales is None else tuple(tuple(float(factor) for factor in scale) for scale in scales)
    return NnUNetLoss(alone._build_loss(), regions, levels)


def labels_of(region: Any) -> tuple[int, ...]:
    """The labels of a region, or the one label of a class, as dataset.json or nnU-Net's label manager has them."""
    return tuple(int(label) for label in region) if isinstance(region, (list, tuple)) else (int(region),)


def _isin(labels: Tensor, region: tuple[int, ...]) -> Tensor:
    return torch.isin(labels, torch.tensor(region, dtype=labels.dtype, device=labels.device))
