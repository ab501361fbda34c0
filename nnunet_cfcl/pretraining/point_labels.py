"""Labels of sampled points, for the supervised objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_cfcl.losses import CountedLoss
from nnunet_cfcl.pretraining.objective import ImageViews
from nnunet_cfcl.views import ClassBalance, read_labels


@dataclass(frozen=True)
class PointLabels:
    """Rules by which points are drawn and labelled from label maps.

    Args:
        balanced_share: share of the points that is drawn in equal numbers from all foreground classes.
        ignore: ignore label, treated as unknown like values below 0; None: none.
        background: label whose points are negatives only.
    """

    balanced_share: float
    ignore: int | None = None
    background: int = 0

    def balance(self, image: ImageViews) -> ClassBalance | None:
        """Build the class balance for the sampler; None for an image without labels."""
        if image.labels is None:
            return None
        return ClassBalance(self._known(image.labels), self.balanced_share, self.background)

    def read(self, image: ImageViews, points: Tensor) -> dict[str, Tensor]:
        """Read the labels of points (..., P, D) in canonical millimetres.

        Returns:
            ``labels`` (..., P), below 0 where unknown, ``weights`` (..., P), their confidence in [0, 1], and
            ``labelled`` (), whether the image has labels.
        """
        if image.labels is None or image.confidence is None:
            nothing = torch.zeros(points.shape[:-1])
            return {"labels": nothing.long() - 1, "weights": nothing, "labelled": torch.tensor(False)}
        spacing = image.geometry.spacing
        return {
            "labels": read_labels(self._known(image.labels), points, spacing),
            "weights": read_labels(image.confidence, points, spacing).clamp(min=0) / 100,
            "labelled": torch.tensor(True),
        }

    def _known(self, labels: Tensor) -> Tensor:
        return labels if self.ignore is None else torch.where(labels == self.ignore, -1, labels)


def where_labelled(
    labelled: Tensor,
    valid: Tensor,
    supervised: Callable[[Tensor], CountedLoss],
    plain: Callable[[Tensor], CountedLoss],
) -> CountedLoss:
    """Combine a supervised loss over the labelled images with an unsupervised one over the others.

    Each is weighted by its number of anchors with a positive. Points of unlabelled images are no negatives of labelled
    ones, since they may be of the anchor's class.

    Args:
        labelled: (B,) bool mask of the images with labels.
        valid: (B, ...) bool mask of the points.
        supervised, plain: the losses as functions of the mask of valid points.
    """
    known = labelled.view(-1, *[1] * (valid.ndim - 1))
    if bool(labelled.all()):
        return supervised(valid)
    parts = [supervised(valid & known), plain(valid & ~known)]
    total = parts[0].plus(parts[1])
    share = parts[0].with_positive / total.with_positive.clamp(min=1)
    return total._replace(loss=share * parts[0].loss + (1 - share) * parts[1].loss)
