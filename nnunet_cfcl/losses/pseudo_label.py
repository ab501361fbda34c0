"""Segmentation loss on pseudo-labels that are known in some voxels only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

#: As in nnU-Net's soft Dice; a class that is neither predicted nor labelled has a Dice of 1.
SMOOTH = 1e-5


def pseudo_label_loss(logits: Tensor, labels: Tensor, known: Tensor, regions: bool = False) -> Tensor:
    r"""Cross-entropy plus soft Dice loss on the voxels whose pseudo-label is known.

    .. math:: L = \frac{1}{|V|} \sum_{v \in V} m_v \, \mathrm{CE}(f_v, y_v) + 1 - \frac{1}{|K|} \sum_{k \in K}
                  \frac{2 \sum_v m_v p_{vk} [y_v = k] + \epsilon}{\sum_v m_v (p_{vk} + [y_v = k]) + \epsilon}

    over all voxels V of the batch and the foreground classes K. The cross-entropy is a mean over all voxels, unknown
    ones counting as 0, so that few known voxels weigh little (FixMatch, Sohn et al. 2020, arXiv 2001.07685, equation
    4). With regions, both terms are those of a sigmoid per region, and K are the regions.

    Args:
        logits: (N, H, *S) of H classes or regions; half precision is computed in float32.
        labels: (N, 1, *S) classes, any integer type; with regions (N, H, *S) bool.
        known: bool of the shape of ``labels``, or weights m in [0, 1].
        regions: whether the network predicts regions.

    Returns:
        Scalar; zero with zero gradients if no voxel is known.
    """
    x = logits if logits.dtype.itemsize == 8 else logits.float()
    mask = known.to(x)
    if regions:
        truth = labels.to(x)
        entropy = F.binary_cross_entropy_with_logits(x, truth, reduction="none") * mask
        probabilities = x.sigmoid()
    else:
        # an unknown voxel may have any label; class 0 keeps the index valid
        classes = labels.long().masked_fill(mask == 0, 0)
        entropy = F.cross_entropy(x, classes[:, 0], reduction="none") * mask[:, 0]
        probabilities = x.softmax(1)[:, 1:]
        truth = (classes == _class_numbers(x)[:, 1:]).to(x)
    axes = [0, *range(2, x.ndim)]
    predicted, labelled = probabilities * mask, truth * mask
    dice = (2 * (probabilities * labelled).sum(axes) + SMOOTH) / (predicted.sum(axes) + labelled.sum(axes) + SMOOTH)
    return entropy.mean() + 1 - dice.mean()


def _class_numbers(x: Tensor) -> Tensor:
    """(1, H, 1, ...) numbers of the classes."""
    return x.new_tensor(range(x.shape[1])).reshape(1, -1, *[1] * (x.ndim - 2))
