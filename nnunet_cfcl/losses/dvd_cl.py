"""DVD-CL: dual-view dense contrastive learning, without labels."""

from __future__ import annotations

from torch import Tensor

from nnunet_cfcl.losses.contrast import CountedLoss, contrast_views
from nnunet_cfcl.losses.embeddings import (
    check_embeddings,
    check_per_point,
    check_positions,
    check_temperature,
    points_per_image,
    take,
    take_samples,
)
from nnunet_cfcl.losses.pair_rules import Neighbours, SamePoint


def dvd_cl_loss(
    a: Tensor, b: Tensor, temperature: float | Tensor = 0.7, valid: Tensor | None = None,
    weights: Tensor | None = None, *, positions: Tensor | None = None, ignore_radius: float = 0.0,
    hard_negatives: float = 0.0,
) -> CountedLoss:
    r"""Dual-view dense contrastive loss between corresponding points of two views.

    Lafargue-Hauret, Mehta, De Sousa Ribeiro, Roschewitz, Glocker, "Pixel-level Counterfactual Contrastive Learning for
    Medical Image Segmentation", arXiv 2603.17110, the objective DVD-CL.

    With :math:`\hat a_n, \hat b_n` the unit embeddings of point n in either view, N the valid points of the whole
    batch and :math:`s_{nm} = \hat a_n \cdot \hat b_m / \tau`,

    .. math:: L = -\frac{1}{N} \sum_n \log \frac{e^{s_{nn}}}{\sum_m e^{s_{nm}}}
                  -\frac{1}{N} \sum_m \log \frac{e^{s_{mm}}}{\sum_n e^{s_{nm}}}

    The one positive of an anchor is the same point of the same image in the other view; its negatives are all other
    points of the other view, of its own image and of the rest of the batch. Both directions are summed, not averaged,
    as in the paper's experiments: at random L is about 2 log N. Time is about five products of N x N x d, memory is
    linear in N (:func:`~nnunet_cfcl.losses.blockwise.two_way_log_sum_exp`).

    Args:
        a: (B, P, d) embeddings of P points in each of B images, first view. Any length: they are normalised here,
            in float32 at least.
        b: (B, P, d) embeddings of the same points in the second view.
        temperature: tau, finite and at least 0.002; below 0.018 blocks are computed in float64. A scalar tensor
            receives a gradient.
        valid: (B, P) bool; False: neither an anchor nor a candidate. Default: all are valid.
        weights: (B, P) in [0, 1]; an anchor counts with its weight in the mean. As a negative a point counts in full.
        positions: (B, P, D) canonical positions of the points in millimetres; required with ignore_radius.
        ignore_radius: mm; other points of the image nearer than this to the anchor are left out of its denominator.
            Sampled points can lie one voxel apart; repelling points of the same tissue counteracts the positives. 0:
            all are negatives, as in the paper.
        hard_negatives: beta >= 0; negatives are weighted by exp(beta x cosine), see
            :mod:`~nnunet_cfcl.losses.contrast`. Most negatives are easy and have little gradient. 0: equal weights,
            as in the paper.

    Returns:
        The loss with the counts of both directions added. ``loss`` is a scalar, float32, or float64 if a is; zero with
        zero gradients without a valid point.

    Raises:
        ValueError: shapes, types or devices do not fit, or temperature, a weight, ignore_radius or hard_negatives is
            out of range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import dvd_cl_loss
        >>> a = torch.eye(4).reshape(2, 2, 4)
        >>> result = dvd_cl_loss(a, a, temperature=1.0)
        >>> result.loss  # 2 log(1 + 3 / e)
        tensor(1.4873)
        >>> int(result.anchors), int(result.with_positive)  # 4 points in 2 directions
        (8, 8)
    """
    check_embeddings({"a": a, "b": b}, "B, P, d")
    check_per_point(a.shape[:2], valid, weights)
    check_temperature(temperature, hard_negatives)
    ignored = _near_points(a, positions, valid, ignore_radius)
    rule = SamePoint(a.device)
    return contrast_views(
        take_samples(a, valid, weights), take_samples(b, valid, weights), (rule, rule), temperature, hard_negatives,
        ignored,
    )


def _near_points(a: Tensor, positions: Tensor | None, valid: Tensor | None, radius: float) -> Neighbours | None:
    if not 0 <= radius < float("inf"):
        raise ValueError(f"ignore_radius must be finite and not negative, got {radius}")
    if radius == 0:
        return None
    if positions is None:
        raise ValueError(f"ignore_radius {radius:g} needs the positions of the points")
    check_positions(positions, a.shape[:2])
    return Neighbours(take(positions, 2, valid).to(a.device), points_per_image(a, valid), radius)
