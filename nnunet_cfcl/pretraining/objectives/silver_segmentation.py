"""Supervised pretraining on label maps, manual or silver, with the segmentation loss of the fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.pretraining.objective import ImageViews, PretrainingModel, Tap
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.views import ViewGeometry, apply_affine_labels

#: (logits (N, K, *patch), or their list under deep supervision; label maps (N, 1, *patch)) -> scalar
SegmentationLoss = Callable[[Any, Tensor], Tensor]


class Segmenter(PretrainingModel):
    """Network with its loss, computed per micro-batch, since the logits are too large to keep.

    Args:
        network: the whole segmentation network.
        loss: segmentation loss of logits and label maps.
    """

    def __init__(self, network: nn.Module, loss: SegmentationLoss) -> None:
        super().__init__(network)
        self._loss = loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss (N,) of each image of (N, C, *patch) with its label map (N, 1, *patch)."""
        logits = self.network(images)
        deep = isinstance(logits, (list, tuple))
        losses = []
        for n in range(len(images)):
            one = slice(n, n + 1)
            losses.append(self._loss([part[one] for part in logits] if deep else logits[one], labels[one]))
        return torch.stack(losses)


@dataclass(frozen=True)
class SilverSegmentationObjective:
    """Segmentation pretraining: every view of an image, counterfactual or not, has the image's labels.

    The loss is that of nnU-Net, view by view: ``batch_dice`` would pool the Dice over a batch, so that the result would
    depend on the numbers of micro-batches and processes. Confidences of silver labels do not enter it. Images without
    labels are left out.

    Args:
        geometry: patch size and spacing.
        segmentation_loss: (logits, label maps (N, 1, *patch) with nnU-Net's values, below 0 outside) -> scalar;
            picklable.
    """

    geometry: ViewGeometry
    segmentation_loss: SegmentationLoss

    tap: ClassVar[Tap] = "segmentation"
    separable: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    labelled_only: ClassVar[bool] = True

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Return no draws: nothing beside the views is random."""
        return {}

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> Tensor:
        """Cut the label maps (len(rows), 1, *patch) of the views."""
        images, views = torch.tensor(rows).unbind(1)
        first = int(images.min())
        crops = batch["labels"][first : int(images.max()) + 1, :1].to(device)[(images - first).to(device)]
        return apply_affine_labels(crops, batch["matrices"][images, views].to(device), self.geometry)

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> Segmenter:
        """Wrap the network with its loss."""
        return Segmenter(network, self.segmentation_loss)

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Average over the views."""
        return outputs.mean(), {}
