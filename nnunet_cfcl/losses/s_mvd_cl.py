"""S-MVD-CL: multi-view dense contrastive learning with labels, which may be silver."""

from __future__ import annotations

from torch import Tensor

from nnunet_cfcl.losses.contrast import CountedLoss, contrast_pool
from nnunet_cfcl.losses.embeddings import (
    check_embeddings,
    check_per_point,
    check_temperature,
    labelled,
    take,
    take_samples,
)
from nnunet_cfcl.losses.pair_rules import SameClass


def s_mvd_cl_loss(
    z: Tensor, labels: Tensor, temperature: float | Tensor = 0.7, background: int = 0, valid: Tensor | None = None,
    weights: Tensor | None = None, *, hard_negatives: float = 0.0,
) -> CountedLoss:
    r"""Supervised multi-view dense contrastive loss: points of one class are positives, in any view of any image.

    Lafargue-Hauret, Mehta, De Sousa Ribeiro, Roschewitz, Glocker, "Pixel-level Counterfactual Contrastive Learning for
    Medical Image Segmentation", arXiv 2603.17110, the objective S-MVD-CL; masked per anchor, as the reference's
    experiments intended.

    All N valid points of all views and images are one pool. With :math:`s_{ac} = \hat z_a \cdot \hat z_c / \tau`, A the
    foreground points and P(a) the other points of a's class,

    .. math:: L = \frac{1}{|A|} \sum_{a \in A} \Big( \log \sum_{c \ne a} e^{s_{ac}}
                  - \frac{1}{|P(a)|} \sum_{p \in P(a)} s_{ap} \Big)

    Background points are no anchors, but negatives of all anchors. Points alone in their class are left out of A. Time
    is about three products of N x N x d, memory is linear in N: positives are found by sums over classes.

    Args:
        z: (B, V, P, d) embeddings of P points in each of V views of B images. Any length: they are normalised here,
            in float32 at least.
        labels: (B, V, P) integer classes; below 0: unknown, the point is invalid.
        temperature: tau, finite and at least 0.002; a scalar tensor receives a gradient (see `dvd_cl_loss`).
        background: class without anchors.
        valid: (B, V, P) bool; False: neither an anchor nor a candidate. Default: all are valid.
        weights: (B, V, P) in [0, 1], confidence in the labels; a point counts with its weight in the mean over anchors
            and in the mean over an anchor's positives. As a negative it counts in full.
        hard_negatives: beta >= 0; negatives are weighted by exp(beta x cosine) (see `dvd_cl_loss`).

    Returns:
        The loss with its counts. ``loss`` is a scalar, float32, or float64 if z is; zero with zero gradients if no
        anchor has a positive.

    Raises:
        ValueError: shapes, types or devices do not fit, or temperature, a weight or hard_negatives is out of range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import s_mvd_cl_loss
        >>> z, labels = torch.eye(3)[None, None], torch.tensor([[[0, 1, 1]]])
        >>> s_mvd_cl_loss(z, labels, temperature=1.0).loss  # log 2
        tensor(0.6931)
    """
    check_embeddings({"z": z}, "B, V, P, d")
    check_per_point(z.shape[:3], valid, weights, labels=labels)
    check_temperature(temperature, hard_negatives)
    known = labelled(labels, valid)
    samples = take_samples(z, known, weights, labels != background)
    return contrast_pool(samples, SameClass(take(labels, 3, known).to(z.device)), temperature, hard_negatives)
