"""Quality of embeddings: alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_cfcl.losses import CountedLoss
from nnunet_cfcl.losses.embeddings import unit_embeddings


@torch.no_grad()
def uniformity(embeddings: Tensor, sample: int = 1024) -> float:
    """Compute the uniformity on the unit sphere (equation 5, t = 2): log mean exp(-2 |a_i - a_j|^2), i < j.

    Args:
        embeddings: (N, d), normalised here.
        sample: largest number of embeddings to compare, evenly spaced over the N.

    Returns:
        0 if all embeddings are equal, about -4 if they cover the sphere evenly; 0 with fewer than two embeddings.
    """
    count = min(len(embeddings), sample)
    if count < 2:
        return 0.0
    chosen = torch.arange(count, device=embeddings.device) * len(embeddings) // count
    distances = torch.pdist(unit_embeddings(embeddings[chosen])).square()
    return float(distances.mul(-2).exp().mean().log())


@torch.no_grad()
def contrast_statistics(
    found: Sequence[CountedLoss], embeddings: Tensor, uninformed: float, temperature: Tensor | float
) -> dict[str, float]:
    """Compute the statistics of a contrastive loss for the monitor.

    Args:
        found: losses of a step.
        embeddings: (N, d) embeddings of the points of the step.
        uninformed: loss of equal embeddings.
        temperature: temperature; a learned one, a tensor, is reported too.

    Returns:
        ``positives``: share of the anchors with a positive, ``alignment``: mean squared distance of anchors and
        positives, in [0, 4] (equation 3), ``uniformity``, ``uninformed``, and a learned ``temperature``.
    """
    anchors, counted = (sum(int(count) for count in counts) for counts in zip(*(one[1:3] for one in found)))
    learned = {"temperature": float(temperature)} if isinstance(temperature, Tensor) else {}
    return {
        "positives": counted / max(1, anchors),
        "alignment": sum(float(one.distances) for one in found) / max(1, counted),
        "uniformity": uniformity(embeddings),
        "uninformed": uninformed,
        **learned,
    }
