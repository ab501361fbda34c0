"""DVD-CL: dual-view dense contrastive learning, without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_cfcl.losses.blockwise import two_way_log_sum_exp
from nnunet_cfcl.losses.embeddings import check_temperature, unit_embeddings


def dvd_cl_loss(a: Tensor, b: Tensor, temperature: float = 0.7, valid: Tensor | None = None) -> Tensor:
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
        a: (B, P, d) embeddings of P points in each of B images, first view. Any length: they are normalised here, and
            computed with in float32 at least.
        b: (B, P, d) embeddings of the same points in the second view.
        temperature: tau, finite and at least 0.002; below 0.018 blocks are computed in float64.
        valid: (B, P) bool; a point that is False is neither an anchor nor a candidate. Default: all are valid.

    Returns:
        The loss (), float32, or float64 if a is. Without a valid point it is zero and gives zero gradients.

    Raises:
        ValueError: shapes, types or devices do not fit, or temperature is out of range.
        RuntimeError: a second derivative is asked for (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import dvd_cl_loss
        >>> a = torch.eye(4).reshape(2, 2, 4)
        >>> dvd_cl_loss(a, a, temperature=1.0)  # 2 log(1 + 3 / e)
        tensor(1.4873)
    """
    check_temperature(temperature)
    _check_pairs(a, b, valid)
    points_a, points_b = (z.flatten(0, 1) if valid is None else z[valid] for z in (a, b))
    if len(points_a) == 0:
        return _zero_with_graph(points_a, points_b)
    x, y = unit_embeddings(points_a) / temperature, unit_embeddings(points_b)
    log_sum_rows, log_sum_columns = two_way_log_sum_exp(x, y, bound=1 / temperature)
    positive = (x * y).sum(dim=-1)
    return (log_sum_rows + log_sum_columns - 2 * positive).mean()


def _zero_with_graph(*points: Tensor) -> Tensor:
    """Sum of empty tensors: backward reaches every parameter with zeros, as distributed training needs."""
    return torch.stack([unit_embeddings(z).sum() for z in points]).sum()


def _check_pairs(a: Tensor, b: Tensor, valid: Tensor | None) -> None:
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"a and b must both be (B, P, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or not a.is_floating_point() or a.device != b.device:
        raise ValueError(
            f"a and b must share a floating type and a device, got {a.dtype} on {a.device} and {b.dtype} on {b.device}"
        )
    if valid is not None and (valid.shape != a.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {tuple(a.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}")
