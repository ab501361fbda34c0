"""NT-Xent on whole images (SimCLR), for any number of views."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_cfcl.losses.contrast import CountedLoss, contrast_pool
from nnunet_cfcl.losses.embeddings import check_embeddings, check_per_point, check_temperature, take, take_samples
from nnunet_cfcl.losses.pair_rules import SameClass


def nt_xent_loss(z: Tensor, temperature: float | Tensor = 0.5, valid: Tensor | None = None) -> CountedLoss:
    r"""Normalised temperature-scaled cross entropy between the views of an image and all other images.

    Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
    arXiv 2002.05709, equation 1, for V = 2. With more views an anchor's positives are all other views of its image, in
    the "outside" form of Khosla et al. 2020, arXiv 2004.11362, equation 2:

    .. math:: L = \frac{1}{B V} \sum_a \Big( \log \sum_{c \ne a} e^{s_{ac}}
                  - \frac{1}{V - 1} \sum_{p \in P(a)} s_{ap} \Big)

    Args:
        z: (B, V, d) embeddings of V views of B images. Any length: they are normalised here, in float32 at
            least.
        temperature: tau, finite and at least 0.002; a scalar tensor receives a gradient.
        valid: (B, V) bool; False: neither an anchor nor a candidate. Default: all are valid.

    Returns:
        The loss with its counts. ``loss`` is a scalar, float32, or float64 if z is; zero with zero gradients if no view
        has a partner.

    Raises:
        ValueError: shape or type does not fit, or temperature is out of range.
        RuntimeError: a second derivative is requested (``create_graph=True``).

    Example:
        >>> import torch
        >>> from nnunet_cfcl.losses import nt_xent_loss
        >>> nt_xent_loss(torch.eye(2)[:, None].repeat(1, 2, 1), temperature=1.0).loss  # log(e + 2) - 1
        tensor(0.5514)
    """
    check_embeddings({"z": z}, "B, V, d")
    check_per_point(z.shape[:2], valid)
    check_temperature(temperature)
    image = torch.arange(len(z), device=z.device)[:, None].expand(z.shape[:2])
    return contrast_pool(take_samples(z, valid, None), SameClass(take(image, 2, valid)), temperature)
