"""Choice of the informative slices of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Voxels along an axis that are sampled to measure how much colours vary in a slice.
SAMPLES = 64


def informative_slices(
    colors: NDArray[np.uint8], inside: NDArray[np.bool_] | None, mask: NDArray[Any] | None, axis: int, count: int = 3
) -> tuple[int, ...]:
    """Choose slices across an axis that show most, at a distance from each other.

    The first is where the mask is largest; every label counts as much as any other, so that a lesion is not lost beside
    an organ. The others come in descending order of the same measure, at a distance from those chosen before. Where the
    mask has no foreground, or in fewer slices than are wanted, the measure is how much colours vary in a slice, less
    and less so towards both ends of the volume.

    Args:
        colors: (Z, Y, X, 3) uint8.
        inside: (Z, Y, X), True where colours count; None: everywhere.
        mask: (Z, Y, X) integers, foreground above 0; None: no mask.
        axis: 0, 1 or 2.
        count: number of slices, at least 1.

    Returns:
        different places, ascending; less than ``count`` where no other slice has a voxel inside. At least one.
    """
    chosen = [] if mask is None else _apart(_foreground(mask, axis), count, ())
    if len(chosen) < count:
        for scores in _variation(colors, inside, axis):
            chosen = _apart(scores, count, chosen)
    return tuple(sorted(chosen or [colors.shape[axis] // 2]))


def labels_of(mask: NDArray[Any]) -> list[int]:
    """Foreground labels, above 0 and ascending, of a mask of integers (Z, Y, X)."""
    counts = _counts(mask, 0).sum(0)
    return [int(label) for label in np.flatnonzero(counts) if label > 0]


def _counts(mask: NDArray[Any], axis: int) -> NDArray[np.int64]:
    """Voxels of the labels 0, 1, ... in every slice (n, labels); what is below 0 counts as 0."""
    highest = int(mask.max(initial=0))
    slices = np.moveaxis(mask, axis, 0)
    return np.stack([np.bincount(np.maximum(part, 0).ravel(), minlength=highest + 1) for part in slices])


def _foreground(mask: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """Sum over the labels of their area in a slice, each in units of its largest area; (n,)."""
    areas = _counts(mask, axis)[:, 1:]
    return (areas / np.maximum(areas.max(0, initial=1), 1)).sum(1)


def _variation(
    colors: NDArray[np.uint8], inside: NDArray[np.bool_] | None, axis: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """For every slice (n,): squared distances of its colours from their mean, summed up; and the number of its colours,
    for where all are alike. Both tapered: the ends of a volume are air, or cut anatomy."""
    thinned = tuple(slice(None) if k == axis else slice(None, None, -(-colors.shape[k] // SAMPLES)) for k in range(3))
    shown = np.moveaxis(colors[thinned], axis, 0).astype(np.float32)
    if inside is None:
        where, number = np.ones(shown.shape[:3], np.float32), np.ones(len(shown))
    else:
        where = np.moveaxis(inside[thinned], axis, 0).astype(np.float32)
        # of all voxels: a few of them may lie between the samples
        number = np.count_nonzero(np.moveaxis(inside, axis, 0), axis=(1, 2)).astype(np.float64)
    means = np.einsum("nabc,nab->nc", shown, where) / np.maximum(where.sum((1, 2)), 1)[:, None]
    shown -= means[:, None, None]
    squares = np.einsum("nabc,nab->n", np.square(shown, out=shown), where)
    taper = np.sin(np.pi * (np.arange(len(shown)) + 0.5) / len(shown))
    return taper * squares, taper * number


def _apart(scores: NDArray[np.floating], count: int, chosen: Sequence[int]) -> list[int]:
    """``chosen`` and places with the highest positive scores, far from one another as long as there is room."""
    taken = list(chosen)
    places = np.flatnonzero(scores > 0)
    if not places.size:
        return taken
    middle = places.mean()
    ranked = places[np.lexsort((np.abs(places - middle), -scores[places]))]
    gap = max(1, int(places[-1] - places[0] + 1) // (count + 1))
    while len(taken) < count and gap > 0:
        free = (place for place in ranked.tolist() if all(abs(place - other) >= gap for other in taken))
        best = next(free, None)
        if best is None:
            gap //= 2
        else:
            taken.append(best)
    return taken
