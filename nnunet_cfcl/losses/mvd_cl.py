"""MVD-CL: multi-view dense contrastive learning, without labels."""

from __future__ import annotations

from torch import Tensor

from nnunet_cfcl.losses.contrast import CountedLoss, contrast_pool
from nnunet_cfcl.losses.embeddings import (
    check_embeddings,
    check_per_point,
    check_positions,
    check_temperature,
    points_per_image,
    take,
    take_samples,
)
from nnunet_cfcl.losses.pair_rules import Neighbours


def mvd_cl_loss(
    z: Tensor, positions: Tensor, temperature: float | Tensor = 0.7, radius: float = 0.1, valid: Tensor | None = None,
    weights: Tensor | None = None, *, hard_negatives: float = 0.0,
) -> CountedLoss:
    r"""Multi-view dense contrastive loss: points near each other in the patient are positives.

    Lafargue-Hauret, Mehta, De Sousa Ribeiro, Roschewitz, Glocker, "Pixel-level Counterfactual Contrastive Learning for
    Medical Image Segmentation", arXiv 2603.17110, the objective MVD-CL.

    All N valid points of all views and images are one pool. With :math:`s_{ac} = \hat z_a \cdot \hat z_c / \tau`,

    .. math:: L = \frac{1}{|A|} \sum_{a \in A} \Big( \log \sum_{c \ne a} e^{s_{ac}}
                  - \frac{1}{|P(a)|} \sum_{p \in P(a)} s_{ap} \Big)

    P(a) are the other points of the same image, in any view (its own view included), closer to a than ``radius``; A are
    the points that have such a neighbour. Everything else is a negative. Time is about three products of N x N x d,
    memory is linear in N (:func:`~nnunet_cfcl.losses.blockwise.pool_log_sum_exp`).

    Args:
        z: (B, V, P, d) embeddings of P points in each of V views of B images; views need not share points. Any length:
            they are normalised here, in float32 at least.
        positions: (B, V, P, D) positions of the points in the patient, each image in its own frame: millimetres divided
            by the longest extent, in [0, 1]. Only distances within an image matter.
        temperature: tau, finite and at least 0.002; a scalar tensor receives a gradient (see `dvd_cl_loss`).
        radius: radius of the positives in the unit of the positions.
        valid: (B, V, P) bool; False: neither an anchor nor a candidate. Default: all are valid.
        weights: (B, V, P) in [0, 1]; a point counts with its weight in the mean over anchors and in the mean over an
            anchor's positives. As a negative it counts in full.
        hard_negatives: beta >= 0; negatives are weighted by exp(beta x cosine) (see `dvd_cl_loss`).

    Returns:
        The loss with its counts. ``loss`` is a scalar, float32, or float64 if z is; zero with zero gradients if no
        point has a neighbour.

    Raises:
        ValueError: shapes, types or devices do not fit, or temperature, radius, a weight or hard_negatives is out of
            range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import mvd_cl_loss
        >>> z = torch.eye(2).repeat(2, 1).reshape(1, 2, 2, 2)
        >>> positions = torch.tensor([0.0, 1.0]).repeat(2).reshape(1, 2, 2, 1)
        >>> mvd_cl_loss(z, positions, temperature=1.0).loss  # log(e + 2) - 1
        tensor(0.5514)
    """
    check_embeddings({"z": z}, "B, V, P, d")
    check_positions(positions, z.shape[:3])
    check_per_point(z.shape[:3], valid, weights)
    check_temperature(temperature, hard_negatives)
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius must be finite and above 0, got {radius}")
    near = Neighbours(take(positions, 3, valid).to(z.device), points_per_image(z, valid), radius)
    return contrast_pool(take_samples(z, valid, weights), near, temperature, hard_negatives)
