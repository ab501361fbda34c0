"""S-DVD-CL: dual-view dense contrastive learning with labels, which may be silver."""

from __future__ import annotations

from torch import Tensor

from nnunet_cfcl.losses.contrast import CountedLoss, contrast_views
from nnunet_cfcl.losses.embeddings import (
    check_embeddings,
    check_per_point,
    check_temperature,
    labelled,
    take,
    take_samples,
)
from nnunet_cfcl.losses.pair_rules import SameClass


def s_dvd_cl_loss(
    a: Tensor, b: Tensor, labels_a: Tensor, labels_b: Tensor, temperature: float | Tensor = 0.7, background: int = 0,
    valid: Tensor | None = None, weights: Tensor | None = None, *, hard_negatives: float = 0.0,
) -> CountedLoss:
    r"""Supervised dual-view dense contrastive loss: points of one class are positives, across views and images.

    Lafargue-Hauret, Mehta, De Sousa Ribeiro, Roschewitz, Glocker, "Pixel-level Counterfactual Contrastive Learning for
    Medical Image Segmentation", arXiv 2603.17110, the objective S-DVD-CL; masked per anchor, as the reference's
    experiments intended.

    With :math:`s_{nm} = \hat a_n \cdot \hat b_m / \tau`, A the foreground points of the first view whose class P(n) is
    met in the second view of any image,

    .. math:: L_{a \to b} = \frac{1}{|A|} \sum_{n \in A} \Big( \log \sum_m e^{s_{nm}}
                  - \frac{1}{|P(n)|} \sum_{m \in P(n)} s_{nm} \Big), \qquad L = L_{a \to b} + L_{b \to a}

    Background points are no anchors, but negatives of all anchors. Time is about five products of N x N x d, memory is
    linear in N: positives are found by sums over classes.

    Args:
        a: (B, P, d) embeddings of P points in each of B images, first view. Any length: they are normalised here,
            in float32 at least.
        b: (B, P, d) embeddings in the second view.
        labels_a: (B, P) integer classes of the points of a; below 0: unknown, the point is invalid.
        labels_b: (B, P) integer classes of the points of b.
        temperature: tau, finite and at least 0.002; a scalar tensor receives a gradient (see `dvd_cl_loss`).
        background: class without anchors.
        valid: (B, P) bool; False: neither an anchor nor a candidate, in both views. Default: all are valid.
        weights: (B, P) in [0, 1], confidence in the labels; a point counts with its weight in the mean over anchors and
            in the mean over an anchor's positives. As a negative it counts in full.
        hard_negatives: beta >= 0; negatives are weighted by exp(beta x cosine) (see `dvd_cl_loss`).

    Returns:
        The loss with the counts of both directions added. ``loss`` is a scalar, float32, or float64 if a is; zero with
        zero gradients if no anchor has a positive.

    Raises:
        ValueError: shapes, types or devices do not fit, or temperature, a weight or hard_negatives is out of range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import s_dvd_cl_loss
        >>> a, labels = torch.eye(2)[None], torch.tensor([[0, 1]])
        >>> s_dvd_cl_loss(a, a, labels, labels, temperature=1.0).loss  # 2 log(1 + 1 / e)
        tensor(0.6265)
    """
    check_embeddings({"a": a, "b": b}, "B, P, d")
    check_per_point(a.shape[:2], valid, weights, labels_a=labels_a, labels_b=labels_b)
    check_temperature(temperature, hard_negatives)
    valid_a, valid_b = labelled(labels_a, valid), labelled(labels_b, valid)
    classes_a, classes_b = take(labels_a, 2, valid_a).to(a.device), take(labels_b, 2, valid_b).to(a.device)
    return contrast_views(
        take_samples(a, valid_a, weights, labels_a != background),
        take_samples(b, valid_b, weights, labels_b != background),
        (SameClass(classes_a, classes_b), SameClass(classes_b, classes_a)), temperature, hard_negatives,
    )
