"""Rendering of the views of a micro-batch on the training device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.counterfactual.source import CounterfactualSource, take
from nnunet_cfcl.views import ViewGeometry, apply_affine_views, apply_intensity

Row = tuple[int, int]


def render_views(
    batch: Mapping[str, Any],
    rows: Sequence[Row],
    source: CounterfactualSource,
    geometry: ViewGeometry,
    settings: ViewSettings,
    device: torch.device,
) -> Tensor:
    """Views (len(rows), C, *patch) of a collated batch, float32 on ``device``.

    Deterministic: the same rows give the same views, so that gradient caching can render them twice.

    Args:
        batch: collated samples of `PretrainingDataset`.
        rows: (image, view) pairs; view 0 is the original, view i its i-th counterfactual.
        source: computes the counterfactuals from their drawn parameters.
        geometry: patch size and spacing.
        settings: settings of the intensity effects.
        device: device that computes the views.
    """
    images, views = torch.tensor(rows).unbind(1)
    # neighbouring rows are views of the same few images, which are moved once
    first = int(images.min())
    crops = batch["image"][first : int(images.max()) + 1].to(device)[(images - first).to(device)]
    altered = views > 0
    if altered.any():
        drawn = take(batch["counterfactual"], images[altered], views[altered] - 1)
        chosen = altered.nonzero()[:, 0].to(device)
        crops[chosen] = source.apply(crops[chosen], drawn, geometry.spacing)
    patches = apply_affine_views(crops, batch["matrices"][images, views].to(device), geometry)
    return apply_intensity(patches, take(batch["intensity"], images, views), settings, geometry.spacing)
