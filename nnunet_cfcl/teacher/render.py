"""Rendering of the pool's views on the training device: weak ones for the teacher, strong ones for the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import CounterfactualSource, take
from nnunet_cfcl.teacher.data import teacher_views
from nnunet_cfcl.views import ViewGeometry, apply_affine_views, apply_intensity


@torch.no_grad()
def render_pool(
    batch: Mapping[str, Any], source: CounterfactualSource, geometry: ViewGeometry, settings: Settings,
    device: torch.device,
) -> tuple[list[Tensor], Tensor]:
    """Cut the same view out of all versions of each image.

    Args:
        batch: collated samples of `PoolDataset`.
        source: computes the counterfactuals from their drawn parameters.
        geometry: patch size and spacing.
        settings: all settings.
        device: device that computes the views.

    Returns:
        Weak views, a list of (N, C, *patch): the images and, where there are any, their counterfactuals on the labelled
        scanner. Strong views (N, C, *patch), see ``teacher.strong_view``.
    """
    crops, matrices = batch["image"].to(device, non_blocking=True), batch["matrix"].to(device, non_blocking=True)
    versions = [crops, *([batch["weak"].to(device, non_blocking=True)] if "weak" in batch else [])]
    weak = [apply_affine_views(one, matrices, geometry) for one in versions]
    chosen = settings.teacher
    if chosen.strong_view == "noise":
        deviation = weak[0].std(tuple(range(1, crops.ndim)), keepdim=True)
        return weak, weak[0] + chosen.noise * deviation * torch.randn_like(weak[0])
    rows, first = torch.arange(len(crops)), torch.zeros(len(crops), dtype=torch.long)
    strong = weak[0].clone()
    if chosen.strong_view == "counterfactual":
        changed = source.apply(crops, take(batch["counterfactual"], rows, first), geometry.spacing)
        strong = apply_affine_views(changed, matrices, geometry)
    return weak, apply_intensity(strong, take(batch["intensity"], rows, first), teacher_views(settings),
                                 geometry.spacing)
