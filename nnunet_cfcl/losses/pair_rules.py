"""Which candidates are the positives of an anchor: all that tells one contrastive objective from another.

A rule is made for the points of one batch, in a row. It neither samples points nor knows a loss: `contrast` does the
rest with any rule. Nothing here has more than a block of all pairs in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nnunet_cfcl.losses.blockwise import Block, strips
from nnunet_cfcl.losses.ranks import Share, current_share

# Pairs of neighbours that are looked at together: 16 MiB in float32.
_STRIP_PAIRS = 2**22


class PairRule(Protocol):
    """N anchors, M candidates and which of their pairs are positive. An anchor is not its own positive."""

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """(M, k) values of the candidates -> (N, k) sums over each anchor's positives; differentiable once."""

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Bool mask of the positive pairs in a block of anchors x candidates, None where there are none. In a pool, an
        anchor's pair with itself may be marked: it is no pair to the kernel."""


class SamePoint:
    """The n-th candidate is the positive of the n-th anchor."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """The diagonal."""
        if rows.stop <= columns.start or columns.stop <= rows.start:
            return None
        mask = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=self._device)
        _own_pairs(mask, rows, columns).fill_(True)
        return mask


class SameClass:
    """Positives are all candidates with the anchor's label, found by sums over classes.

    Args:
        anchors: (N,) integer labels.
        candidates: (M,) integer labels; None: the anchors, in one pool with them.
    """

    def __init__(self, anchors: Tensor, candidates: Tensor | None = None) -> None:
        self._anchors, self._pool = anchors, candidates is None
        self._candidates = anchors if candidates is None else candidates

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Sum of the anchor's class, without its own value in a pool."""
        # an own value is taken out of a sum it may dominate; Apple's devices have no float64
        wide = values if values.device.type == "mps" else values.double()
        classes, number = torch.cat([self._anchors, self._candidates]).unique(return_inverse=True)
        of_anchor, of_candidate = number[: len(self._anchors)], number[len(self._anchors) :]
        sums = wide.new_zeros(len(classes), wide.shape[1]).index_add(0, of_candidate, wide)
        found = sums.index_select(0, of_anchor)
        return (found - wide if self._pool else found).to(values.dtype)

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Pairs with equal labels."""
        return self._anchors[rows, None] == self._candidates[None, columns]


class Neighbours:
    """Positives are the other points of the same image that are nearer than a radius, in one pool.

    Args:
        positions: (N, D) of all points, image after image, in any unit.
        sizes: points of each image.
        radius: in the same unit; a point at exactly this distance is not near.
    """

    def __init__(self, positions: Tensor, sizes: Sequence[int], radius: float) -> None:
        wide = positions.detach().to(torch.promote_types(positions.dtype, torch.float32))
        self._axes = wide.T.contiguous()
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self._images = [slice(stop - size, stop) for stop, size in zip(stops, sizes)]
        self._radius = radius

    def sum_over_positives(self, values: Tensor) -> Tensor:
        """Sum over the neighbourhood; processes that share blocks share this."""
        sums: Tensor = _NeighbourSums.apply(values, self, current_share())
        return sums

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """Near pairs of points of one image."""
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
        """Bool mask of the near pairs in a block that lies within an image; a point is not near itself."""
        first, *others = ((axis[rows, None] - axis[None, columns]).square_() for axis in self._axes)
        mask = sum(others, start=first) < self._radius**2
        _own_pairs(mask, rows, columns).fill_(False)
        return mask

    def strips(self, processes: int) -> list[Block]:
        """All pairs within an image, as (rows, the image's points), in pieces for that many processes."""
        blocks = []
        for image in self._images:
            size = image.stop - image.start
            height = max(1, min(_STRIP_PAIRS // max(1, size), -(-size // processes)))
            blocks += [(_shift_back(part, image), image) for part in strips(size, height)]
        return blocks


class _NeighbourSums(torch.autograd.Function):
    """The mask of near pairs, a symmetric matrix, times values: the gradient is the same product again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rule: Neighbours, share: Share) -> Tensor:
        """Strip by strip."""
        ctx.rule, ctx.share = rule, share
        return _near_product(values, rule, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Strip by strip."""
        return _near_product(gradient, ctx.rule, ctx.share), None, None


def _near_product(values: Tensor, rule: Neighbours, share: Share) -> Tensor:
    sums = torch.zeros_like(values)
    with torch.autocast(values.device.type, enabled=False):
        for rows, image in share.mine(rule.strips(share.count)):
            torch.mm(rule.near(rows, image).to(values.dtype), values[image], out=sums[rows])
    share.sum(sums)
    return sums


def _own_pairs(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """The pairs of a point with itself in the mask of a block."""
    return mask.diagonal(rows.start - columns.start)


def _overlap(part: slice, image: slice) -> slice:
    return slice(max(part.start, image.start), min(part.stop, image.stop))


def _shift(part: slice, origin: slice) -> slice:
    return slice(part.start - origin.start, part.stop - origin.start)


def _shift_back(part: slice, origin: slice) -> slice:
    return slice(part.start + origin.start, part.stop + origin.start)
