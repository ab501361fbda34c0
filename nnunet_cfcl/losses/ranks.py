"""Distribution of the blockwise kernels over the processes of torch.distributed that hold the same embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of the work of one process.

    Args:
        rank: rank in the group.
        count: number of processes; 1 by default.
        group: process group; None: the default group.
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """Select every ``count``-th piece, which balances pieces of similar cost."""
        return work[self.rank :: self.count]

    def sum(self, *partial: Tensor | None) -> None:
        """Sum contiguous tensors over the processes, in place; None is skipped."""
        if self.count > 1:
            for tensor in partial:
                if tensor is not None:
                    dist.all_reduce(tensor, group=self.group)

    def all_have(self, value: int, device: torch.device) -> bool:
        """Whether the value is equal on all processes."""
        if self.count == 1:
            return True
        highest = torch.tensor([value, -value], device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        return bool(highest.sum() == 0)


_ALONE = Share()
_share: ContextVar[Share] = ContextVar("share", default=_ALONE)


@contextmanager
def share_blocks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Share the pairs of points among the processes within the context.

    Every process of the group must hold the same embeddings of the whole batch and call the same losses in the same
    order, forward and backward. Values and gradients are complete and equal on all of them; a process that owns
    some of the embeddings keeps their gradient and ignores the rest. A loss that was computed within the context may
    run backward outside it. Per loss, N floats are exchanged forward and N d backward.

    Args:
        group: process group of torch.distributed, any backend; None: all processes.

    Raises:
        ValueError: torch.distributed is not running, or this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("share_blocks needs torch.distributed to be initialised: call init_process_group first")
    if dist.get_rank(group) < 0:
        raise ValueError("share_blocks was called on a process that is not in the group")
    token = _share.set(Share(dist.get_rank(group), dist.get_world_size(group), group))
    try:
        yield
    finally:
        _share.reset(token)


def current_share() -> Share:
    """Return the share of this process: all of the work outside `share_blocks`."""
    return _share.get()
