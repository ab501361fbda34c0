"""Picture of the views of a few images with corresponding points, which the network learns to match."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from nnunet_cfcl.files.figure_text import names_as_they_are
from nnunet_cfcl.views import to_view

POINTS_SHOWN = 6
COLOURS = ("#e41a1c", "#ffd92f", "#4daf4a", "#00c5ff", "#ff7f00", "#f781bf")


@names_as_they_are
def plot_views(batch: Mapping[str, Any], views: Tensor, file: Path, others: str = "counterfactual") -> None:
    """Draw one row per image, the view of the original and then those of its counterfactuals, as PNG.

    Points of one colour are one place of the patient; methods that sample no points have none. A volume is shown by its
    middle slice, with the points projected onto it.

    Args:
        batch: collated samples, with ``matrices`` (B, V, D, D+1), and perhaps ``points`` (B, ..., P, D) in canonical mm
            and ``valid`` (B, ..., P) under ``drawn``.
        views: (B, V, C, *patch); the first channel is shown.
        file: the picture.
        others: title of the views after the first.
    """
    images, count = views.shape[:2]
    figure = Figure(figsize=(2.2 * count, 2.3 * images), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(images, count, squeeze=False))
    for image in range(images):
        shown = _points_in_all_views(batch, image)
        for view in range(count):
            _show(axes[image, view], views[image, view, 0], shown[view])
            if image == 0:
                axes[image, view].set_title("original" if view == 0 else f"{others} {view}", fontsize=9)
    figure.suptitle("Views of the first images; points of one colour are one place", fontsize=10)
    figure.savefig(file, dpi=100, format="png")


def _points_in_all_views(batch: Mapping[str, Any], image: int) -> Tensor:
    """(V, K, D) normalised coordinates of up to `POINTS_SHOWN` sampled points, those inside most views."""
    matrices, drawn = batch["matrices"][image], batch["drawn"]
    if "points" not in drawn:
        return matrices.new_empty(len(matrices), 0, matrices.shape[1])
    candidates = drawn["points"][image].flatten(0, -2)[drawn["valid"][image].flatten()]
    coordinates = torch.stack([to_view(candidates, matrix) for matrix in matrices])
    seen = (coordinates.abs() <= 1).all(-1).sum(0)
    return coordinates[:, seen.argsort(descending=True, stable=True)[:POINTS_SHOWN]]


def _show(axis: Any, volume: Tensor, points: Tensor) -> None:
    picture = (volume if volume.ndim == 2 else volume[volume.shape[0] // 2]).numpy()
    low, high = np.percentile(picture, [0.5, 99.5])
    axis.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    inside = (points.abs() <= 1).all(-1)
    # pixel k of n lies at (2k+1)/n - 1
    rows, columns = ((points[:, -2:] + 1) * torch.tensor(picture.shape) - 1).div(2).unbind(1)
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(points)) if inside[k]]
    axis.scatter(columns[inside].numpy(), rows[inside].numpy(), c=colours, s=18, edgecolors="black", linewidths=0.5)
    axis.set_axis_off()
