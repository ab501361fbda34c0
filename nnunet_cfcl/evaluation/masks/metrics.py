"""Dice, HD95, average symmetric surface distance and normalised surface Dice of one case, label by label.

Surface voxels and their distances come from MONAI (``monai.metrics.get_mask_edges`` and ``get_surface_distance``). The
metrics equal its ``compute_hausdorff_distance``, ``compute_average_surface_distance`` and ``compute_surface_dice``, but
share one distance computation. Empty masks, which these functions treat differently from each other, are handled here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from monai.metrics import get_mask_edges, get_surface_distance
from numpy.typing import NDArray
from scipy.ndimage import find_objects

#: Metrics in the order of the fields of `LabelMetrics`.
METRICS = ("dice", "hd95_mm", "assd_mm", "nsd")
#: Metrics for which less is better.
DISTANCES = ("hd95_mm", "assd_mm")

Box = tuple[slice, ...]


@dataclass(frozen=True)
class LabelMetrics:
    """Metrics of one label in one case; the defaults are the values of a label in neither mask.

    Attributes:
        dice: 0 to 1; NaN if the label is in neither mask (as in nnU-Net), 0 if it is in exactly one.
        hd95_mm: larger of the two directed 95th percentiles of surface distances, 0 or more; NaN unless in both masks.
        assd_mm: mean distance of all surface voxels to the other surface, 0 or more; NaN unless in both masks.
        nsd: share of all surface voxels within the tolerance of the other surface, 0 to 1; NaN if the label is in
            neither mask, 0 if it is in exactly one.
        in_truth: whether the label is in the true mask.
        in_prediction: whether the label is in the predicted mask.
    """

    dice: float = math.nan
    hd95_mm: float = math.nan
    assd_mm: float = math.nan
    nsd: float = math.nan
    in_truth: bool = False
    in_prediction: bool = False

    @property
    def values(self) -> tuple[float, ...]:
        """Values in the order of `METRICS`."""
        return tuple(float(value) for value in astuple(self)[: len(METRICS)])

    @property
    def missed(self) -> bool:
        """Whether the label is in exactly one of the masks, so that no surface distance exists."""
        return self.in_truth != self.in_prediction


def case_metrics(
    truth: NDArray[np.integer], prediction: NDArray[np.integer], spacing: Sequence[float], tolerance: float,
    labels: Iterable[int] | None = None, ignore: int | None = None,
) -> dict[int, LabelMetrics]:
    """Compute the metrics of a case.

    Axes of one voxel are dropped: the surface of a 2D image, or of a single slice, is a contour.

    Args:
        truth: (Z, Y, X) or (Y, X), labels of 0 or more.
        prediction: labels of the same shape.
        spacing: voxel size per axis in mm (1 for images without a physical size, whose distances are in pixels).
        tolerance: tolerance of the normalised surface Dice, in the unit of the spacing.
        labels: labels to evaluate; None: all labels in either mask except 0.
        ignore: label of voxels without ground truth, which count as background in both masks.

    Returns:
        Label -> metrics.

    Raises:
        ValueError: shapes or spacing do not match.
    """
    if truth.shape != prediction.shape or len(spacing) != truth.ndim:
        raise ValueError(f"truth {truth.shape}, prediction {prediction.shape} and spacing {tuple(spacing)} must match")
    if ignore is not None:
        known = truth != ignore
        truth, prediction = np.where(known, truth, 0), np.where(known, prediction, 0)
    truth, prediction, sizes = _without_flat_axes(truth, prediction, spacing)
    boxes = [_boxes(mask) for mask in (truth, prediction)]
    wanted = sorted({*boxes[0], *boxes[1]}) if labels is None else labels
    return {label: _label_metrics(truth, prediction, label, [one.get(label) for one in boxes], sizes, tolerance)
            for label in wanted}


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the image diagonal, without axes of one voxel: the longest possible distance."""
    return math.hypot(*(count * size for count, size in zip(shape, spacing) if count > 1))


def _without_flat_axes(
    truth: NDArray[np.integer], prediction: NDArray[np.integer], spacing: Sequence[float]
) -> tuple[NDArray[np.integer], NDArray[np.integer], tuple[float, ...]]:
    flat = [axis for axis, count in enumerate(truth.shape) if count == 1]
    # a contour needs two axes
    flat = flat[: max(0, truth.ndim - 2)]
    sizes = tuple(float(size) for axis, size in enumerate(spacing) if axis not in flat)
    return truth.squeeze(tuple(flat)), prediction.squeeze(tuple(flat)), sizes


def _boxes(mask: NDArray[np.integer]) -> dict[int, Box]:
    """Bounding box of every label in a mask."""
    return {label: box for label, box in enumerate(find_objects(mask), start=1) if box is not None}


def _label_metrics(
    truth: NDArray[np.integer], prediction: NDArray[np.integer], label: int, boxes: Sequence[Box | None],
    spacing: Sequence[float], tolerance: float,
) -> LabelMetrics:
    present = [box is not None for box in boxes]
    if not all(present):
        overlap = 0.0 if any(present) else math.nan
        return LabelMetrics(overlap, math.nan, math.nan, overlap, *present)
    pairs = zip(*(box for box in boxes if box is not None))
    # outside the joint bounding box both masks are background: surfaces and counts do not change
    joint = tuple(slice(min(one.start, other.start), max(one.stop, other.stop)) for one, other in pairs)
    masks = truth[joint] == label, prediction[joint] == label
    dice = 2 * np.count_nonzero(masks[0] & masks[1]) / (np.count_nonzero(masks[0]) + np.count_nonzero(masks[1]))
    surfaces = get_mask_edges(*masks, crop=False)
    directed = [np.asarray(get_surface_distance(one, other, spacing=list(spacing)), np.float64)
                for one, other in (surfaces, surfaces[::-1])]
    distances = np.concatenate(directed)
    return LabelMetrics(dice, max(float(np.quantile(one, 0.95)) for one in directed), float(distances.mean()),
                        float(np.mean(distances <= tolerance)), True, True)
