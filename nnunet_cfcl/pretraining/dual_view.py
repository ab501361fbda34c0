"""Which points are read and which embeddings are compared, for objectives on pairs of views (method section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from nnunet_cfcl.views import ViewGeometry, draw_corresponding_points, to_view


class Objective(Protocol):
    """What an objective needs from the pretraining loop; pairs (draw, coordinates, loss) of random and pure parts."""

    def draw(self, generator: Generator, matrices: Tensor, geometry: ViewGeometry, tissue: Tensor) -> dict[str, Tensor]:
        """Sampled points of one image, from its views' matrices (V, D, D+1); what it returns is collated."""

    def coordinates(self, batch: Mapping[str, Tensor], image: int, view: int) -> Tensor:
        """Normalised coordinates (K, D) at which this view of this image is read."""

    def loss(self, embeddings: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and statistics from the embeddings of all images, views and points, in this order, (M, d)."""


@dataclass(frozen=True)
class DualViewObjective:
    """View 0 (the original) against every other view: the pairs (0, i), i = 1..V-1, averaged.

    Args:
        pair_loss: (a (B, P, d), b (B, P, d), valid=(B, P)) -> scalar, e.g. ``dvd_cl_loss`` with its temperature;
            picklable, because the objective goes to the data loading processes.
        points: P, points per image and pair.
    """

    pair_loss: Callable[..., Tensor]
    points: int

    def draw(self, generator: Generator, matrices: Tensor, geometry: ViewGeometry, tissue: Tensor) -> dict[str, Tensor]:
        """``points`` (V-1, P, D) in canonical millimetres and ``valid`` (V-1, P)."""
        points, valid = draw_corresponding_points(generator, matrices, geometry, tissue, self.points)
        return {"points": points, "valid": valid}

    def coordinates(self, batch: Mapping[str, Tensor], image: int, view: int) -> Tensor:
        """View 0 is read at the points of all pairs, ((V-1) P, D); another view at its own pair's, (P, D)."""
        points = batch["points"][image].flatten(0, 1) if view == 0 else batch["points"][image, view - 1]
        return to_view(points, batch["matrices"][image, view])

    def loss(self, embeddings: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean of the pairs' losses, and statistics for the monitor (see `pair_statistics`)."""
        images, pairs, points = batch["valid"].shape
        a, b = embeddings.view(images, 2, pairs, points, -1).unbind(1)
        valid = batch["valid"].to(embeddings.device)
        losses = [self.pair_loss(a[:, i], b[:, i], valid=valid[:, i]) for i in range(pairs)]
        return torch.stack(losses).mean(), pair_statistics(a[valid], b[valid], valid)


@torch.no_grad()
def pair_statistics(a: Tensor, b: Tensor, valid: Tensor, sample: int = 1024) -> dict[str, float]:
    """Alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242, equations 3 and 5) of matched embeddings.

    Args:
        a, b: (N, d) embeddings of corresponding points, normalised here.
        valid: which of all points are valid; their share is the share of anchors with a positive.
        sample: uniformity is computed on at most this many evenly spaced points.

    Returns:
        ``alignment``: mean |a - b|^2 in [0, 4], 0 = views agree. ``uniformity``: log mean exp(-2 |a_i - a_j|^2), 0 =
        all embeddings are the same, about -4 = spread over the sphere. ``positives``: share in [0, 1].
        ``candidates``: mean number N of candidates of an anchor; an uninformed loss is 2 log N.
    """
    statistics = {"positives": float(valid.float().mean()), "candidates": len(a) / valid.shape[1]}
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (a, b))
    if len(a) < 2:
        return {"alignment": 0.0, "uniformity": 0.0, **statistics}
    some = a[:: max(1, len(a) // sample)][:sample]
    distances = torch.pdist(some).square()
    return {
        "alignment": float((a - b).square().sum(-1).mean()),
        "uniformity": float(distances.mul(-2).exp().mean().log()),
        **statistics,
    }
