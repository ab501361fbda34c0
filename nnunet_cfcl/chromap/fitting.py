"""Steps of the fit of a colour space: standardisation, principal components, UMAP, ellipse to disc."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.chromap.ellipse import minimum_volume_enclosing_ellipse
from nnunet_cfcl.errors import UserError

#: UMAP's own defaults. With no more landmarks than neighbours UMAP cannot be fitted.
UMAP_NEIGHBOURS, UMAP_MIN_DISTANCE = 15, 0.1
#: A standard deviation below this share of the feature's mean, or a variance below this share of that of the first
#: component, is rounding.
ROUNDING = 1e-6


class Affine(NamedTuple):
    """x -> matrix @ x + shift."""

    matrix: Tensor
    shift: Tensor


def checked_samples(features: Tensor | NDArray[Any]) -> Tensor:
    """Check features and return them as (N, F) float64 on the CPU.

    Raises:
        ValueError: another shape, or no samples.
        UserError: features that are not finite.
    """
    samples = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if samples.ndim != 2 or not samples.numel():
        raise ValueError(f"expected features (N, F), at least one, found {tuple(samples.shape)}")
    bad = int((~samples.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"{bad} of {len(samples)} samples have features that are not finite (NaN or infinite)",
                        "look at the losses of the training, which has most likely diverged")
    return samples


def principal_components(samples: Tensor, components: int) -> Affine:
    """Standardisation and projection, ordered by variance; (k, F) with 2 <= k <= components.

    Rows that hold only rounding errors are zero, or left out. Signs are such that each component's third moment is
    positive: they do not depend on the order of samples, nor on the sign of a feature.
    """
    mean, std = samples.mean(0), samples.std(0, correction=0)
    varies = std > ROUNDING * mean.abs().clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(varies, 1 / std.where(varies, 1), 0)
    standard = (samples - mean) * scale
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(samples))
    kept = int((values > ROUNDING * values[-1].clamp_min(ROUNDING)).sum())
    axes = vectors.flip(1)[:, : min(components, kept)].T
    thirds = (standard @ axes.T).pow(3).sum(0)
    axes = axes * torch.where(thirds < 0, -1.0, 1.0)[:, None]
    axes = torch.cat([axes, axes.new_zeros(max(0, 2 - len(axes)), len(mean))])
    weight = axes * scale
    return Affine(weight, -(weight @ mean))


def umap_places(landmarks: Tensor, seed: int) -> Tensor | str:
    """Places (L, 2) float64 of landmarks (L, k), or the reason why UMAP cannot place them."""
    if len(landmarks) <= UMAP_NEIGHBOURS:
        return f"UMAP needs more than {UMAP_NEIGHBOURS} different samples, found {len(landmarks)}"
    if not landmarks[:, 1].any():
        return "the samples lie on a line"
    # slow to import, and needed for fitting alone
    from umap import UMAP

    # this initialisation keeps the coarse order of the components, and does not depend on eigenvectors of a graph
    start = landmarks[:, :2].numpy().astype(np.float32)
    model = UMAP(n_neighbors=UMAP_NEIGHBOURS, min_dist=UMAP_MIN_DISTANCE, init=start, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placed = torch.from_numpy(np.asarray(model.fit_transform(landmarks.numpy().astype(np.float32)))).double()
    return placed if placed.isfinite().all() else "UMAP found no finite places"


def to_disc(places: Tensor, guide: Tensor, coverage: float) -> Affine:
    """Map the ellipse around places (N, 2) to the unit disc, turned and mirrored towards the guide (N, 2)."""
    found = minimum_volume_enclosing_ellipse(places.numpy(), coverage=coverage)
    centre, form = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in found)
    squares, axes = torch.linalg.eigh(form)
    round_ = (axes * squares.clamp_min(0).sqrt()) @ axes.T
    # the orthogonal map that takes places nearest to the guide (Schönemann 1966); for equal weights of its two axes
    guide = guide - guide.mean(0)
    guide = guide / guide.std(0, correction=0).clamp_min(math.sqrt(torch.finfo(torch.float64).tiny))
    left, _, right = torch.linalg.svd(guide.T @ ((places - centre) @ round_.T))
    turn = left @ right @ round_
    return Affine(turn, -(turn @ centre))


def clipped(places: Tensor) -> Tensor:
    """Places (N, 2) within the unit disc; those outside are moved to the rim straight towards the centre."""
    return places / torch.linalg.vector_norm(places, dim=1, keepdim=True).clamp_min(1)
