"""Pair rules: which candidates are the positives of an anchor, the one difference between the contrastive losses.

A rule is built for the flattened points of one batch. It neither samples points nor computes a loss; `contrast` turns
any rule into a loss. No more than one block of all pairs is held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nnunet_cfcl.losses.blockwise import Block, strips
from nnunet_cfcl.losses.ranks import Share, current_share

# Pairs whose distances are computed at once: 16 MiB in float32.
_STRIP_PAIRS = 2**22


class PairRule(Protocol):
    """Positive pairs among N anchors and M candidates. In a pool, an anchor is not its own positive."""

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Sum the values (M, k) of the candidates over the positives of each anchor, (N, k); differentiable once."""

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Mask the positive pairs in a block of anchors x candidates; None if it has none. In a pool, the pair of a
        point with itself may be marked, which the kernel excludes anyway."""


class SamePoint:
    """The positive of the n-th anchor is the n-th candidate."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Return the values: every anchor has one positive."""
        return values

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Mask the diagonal."""
        if rows.stop <= columns.start or columns.stop <= rows.start:
            return None
        mask = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=self._device)
        _own_pairs(mask, rows, columns).fill_(True)
        return mask


class SameClass:
    """The positives of an anchor are all candidates of its class, summed class by class.

    Args:
        anchors: (N,) integer labels.
        candidates: (M,) integer labels; None: the anchors, in one pool with them.
    """

    def __init__(self, anchors: Tensor, candidates: Tensor | None = None) -> None:
        self._anchors, self._pool = anchors, candidates is None
        self._candidates = anchors if candidates is None else candidates

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Sum over the anchor's class, without the anchor itself in a pool."""
        # float64: the anchor's own value is subtracted from a sum that it may dominate; MPS has no float64
        wide = values if values.device.type == "mps" else values.double()
        classes, number = torch.cat([self._anchors, self._candidates]).unique(return_inverse=True)
        of_anchor, of_candidate = number[: len(self._anchors)], number[len(self._anchors) :]
        sums = wide.new_zeros(len(classes), wide.shape[1]).index_add(0, of_candidate, wide)
        found = sums.index_select(0, of_anchor)
        return (found - wide if self._pool else found).to(values.dtype)

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Mask the pairs of equal labels."""
        return self._anchors[rows, None] == self._candidates[None, columns]


class Neighbours:
    """The positives of an anchor are the other points of its image within a radius, in one pool.

    Args:
        positions: (N, D) positions of all points, image after image, in any unit.
        sizes: numbers of points of the images.
        radius: radius in the same unit; a point at exactly this distance is not a positive.
    """

    def __init__(self, positions: Tensor, sizes: Sequence[int], radius: float) -> None:
        wide = positions.detach().to(torch.promote_types(positions.dtype, torch.float32))
        self._axes = wide.T.contiguous()
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self._images = [slice(stop - size, stop) for stop, size in zip(stops, sizes)]
        self._radius = radius

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Sum over the neighbourhood; within `share_blocks` the processes share the work."""
        sums: Tensor = _NeighbourSums.apply(values, self, current_share())
        return sums

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Mask the pairs of near points of one image."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        mask = None
        for image in self._images:
            i, j = _overlap(rows, image), _overlap(columns, image)
            if i.start < i.stop and j.start < j.stop:
                if mask is None:
                    mask = torch.zeros(shape, dtype=torch.bool, device=self._axes.device)
                mask[_shift(i, rows), _shift(j, columns)] = self.near(i, j)
        return mask

    def near(self, rows: slice, columns: slice) -> Tensor:
        """Mask the near pairs in a block that lies within one image; a point is not near itself."""
        first, *others = ((axis[rows, None] - axis[None, columns]).square_() for axis in self._axes)
        mask = sum(others, start=first) < self._radius**2
        _own_pairs(mask, rows, columns).fill_(False)
        return mask

    def strips(self, processes: int) -> list[Block]:
        """Divide the pairs within each image into (rows, points of the image), enough pieces for all processes."""
        blocks = []
        for image in self._images:
            size = image.stop - image.start
            height = max(1, min(_STRIP_PAIRS // max(1, size), -(-size // processes)))
            blocks += [(_shift_back(part, image), image) for part in strips(size, height)]
        return blocks


class _NeighbourSums(torch.autograd.Function):
    """Product of the symmetric mask of near pairs with values; the gradient is the same product again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rule: Neighbours, share: Share) -> Tensor:
        """Multiply strip by strip."""
        ctx.rule, ctx.share = rule, share
        return _near_product(values, rule, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Multiply the gradient strip by strip."""
        return _near_product(gradient, ctx.rule, ctx.share), None, None


def _near_product(values: Tensor, rule: Neighbours, share: Share) -> Tensor:
    sums = torch.zeros_like(values)
    with torch.autocast(values.device.type, enabled=False):
        for rows, image in share.mine(rule.strips(share.count)):
            torch.mm(rule.near(rows, image).to(values.dtype), values[image], out=sums[rows])
    share.sum(sums)
    return sums


def _own_pairs(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """View the pairs of a point with itself in the mask of a block."""
    return mask.diagonal(rows.start - columns.start)


def _overlap(part: slice, image: slice) -> slice:
    return slice(max(part.start, image.start), min(part.stop, image.stop))


def _shift(part: slice, origin: slice) -> slice:
    return slice(part.start - origin.start, part.stop - origin.start)


def _shift_back(part: slice, origin: slice) -> slice:
    return slice(part.start + origin.start, part.stop + origin.start)
