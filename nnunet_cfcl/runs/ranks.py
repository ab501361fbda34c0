"""Processes (ranks) that share every step: each has a part of the images, the loss is that of the whole batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunet_cfcl.errors import UserError, isolated
from nnunet_cfcl.losses import share_blocks

T = TypeVar("T")
#: Interval at which ranks ask whether the main rank has finished.
SECONDS_BETWEEN_QUESTIONS = 1.0


@dataclass(frozen=True)
class Ranks:
    """This process among ``count`` processes of torch.distributed's default group; alone by default.

    Every rank holds the embeddings of the whole batch and computes the same loss, whose blocks the ranks share
    (`losses.share_blocks`). The gradient of `gather` is the rank's own part, so that the parameters' gradients add up
    to those of one process with the whole batch. All methods but `images` and `is_main` must be called by every rank.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """This process in torch.distributed; the only rank where it is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def images(
        self, images_per_step: int, rank: int | None = None, setting: str = "pretrain.images_per_step"
    ) -> range:
        """Images of a step that one rank (this one by default) processes.

        Args:
            images_per_step: number of images of a step, over all ranks.
            rank: number of the rank; None: this one.
            setting: name of the setting of ``images_per_step``, for the message.

        Raises:
            UserError: there are fewer images than ranks.
        """
        if images_per_step < self.count:
            raise UserError(
                f"{self.count} processes share the {images_per_step} images of a step",
                f"use at most {images_per_step} processes, or raise {setting}"
            )
        rank = self.rank if rank is None else rank
        return range(rank * images_per_step // self.count, (rank + 1) * images_per_step // self.count)

    def gather(self, part: Tensor, images_per_step: int) -> Tensor:
        """Tensor (images x k, ...) of all ranks' parts in the order of the images, on the device of the part.

        Args:
            part: (images of this rank x k, ...) of any type; k and further axes are the same on every rank.
            images_per_step: number of images of a step, over all ranks.
        """
        if self.count == 1:
            return part
        sizes = [len(self.images(images_per_step, rank)) for rank in range(self.count)]
        per_image = len(part) // sizes[self.rank]
        joined: Tensor = _Gather.apply(part, [size * per_image for size in sizes], self.rank)
        return joined

    def sharing_blocks(self) -> AbstractContextManager[Any]:
        """Context in which the blockwise losses split their work over the ranks."""
        return share_blocks(dist.group.WORLD) if self.count > 1 else nullcontext()

    def sum_gradients(self, parameters: Iterable[nn.Parameter], whole: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all ranks; a parameter that no rank's loss reached keeps None, as in one process.

        Args:
            parameters: parameters of one type on one device, the same on every rank.
            whole: the parameters among them whose gradients are complete on every rank already.
        """
        if self.count == 1:
            return
        parameters, complete = list(parameters), {id(parameter) for parameter in whole}
        # gradients that are complete on every rank are taken from the main rank
        own = [None if id(p) in complete and not self.is_main else p.grad for p in parameters]
        parts = [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, own, strict=True)]
        reached = parts[0].new_tensor([part is not None for part in own])
        flat = torch.cat([*(part.detach().flatten() for part in parts), reached])
        dist.all_reduce(flat)
        *totals, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, total, count in zip(parameters, totals, counts.tolist(), strict=True):
            parameter.grad = total.view_as(parameter) if count else None

    def total(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def broadcast_parameters(self, model: nn.Module) -> None:
        """Copy the main rank's parameters and buffers to all ranks."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def broadcast_object(self, content: Any) -> Any:
        """The main rank's object, which may be large, on every rank; the objects of the others are ignored."""
        if self.count == 1:
            return content
        box = [content if self.is_main else None]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """Result of ``work``, which runs on the main rank first and then on the others, for work that writes files.

        Raises:
            UserError: an error of the main rank, on every rank and of the same class; an error of another rank, there.
        """
        results: list[T] = []
        complaint: UserError | None = None
        if self.is_main:
            try:
                results.append(work())
            except UserError as error:
                complaint = error
        complaint = self.broadcast_object(complaint)
        if complaint is not None:
            raise complaint
        return results[0] if self.is_main else work()

    def main_only(self, work: Callable[[], T]) -> T:
        """Result of ``work`` of the main rank on every rank.

        It may take hours: the other ranks ask at short intervals, as torch.distributed gives up on a rank after minutes
        of waiting.

        Args:
            work: a function whose result can be pickled.

        Raises:
            UserError: an error of the main rank, on every rank.
        """
        if self.count == 1:
            return work()
        thread = _Working(work) if self.is_main else None
        while not self.broadcast_object(thread is None or not thread.is_alive()):
            time.sleep(SECONDS_BETWEEN_QUESTIONS)
        result, complaint = self.broadcast_object(None if thread is None else (thread.result, thread.complaint))
        if complaint is not None:
            raise complaint
        return cast(T, result)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            dist.barrier()


class _Working(threading.Thread):
    """Thread that runs a function and keeps its result or its error."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.result: Any = None
        self.complaint: Exception | None = None
        self.start()

    def run(self) -> None:
        """Keep any error for the other ranks."""
        with isolated() as errors:
            self.result = self._work()
        self.complaint = errors[0] if errors else None


class _Gather(torch.autograd.Function):
    """Concatenation over the ranks; the gradient, equal on all ranks, is cut to the rank's own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.start, ctx.length = sum(sizes[:rank]), sizes[rank]
        # as bytes, as no backend supports all types, and padded, as all backends want equal sizes
        sent = part.reshape(len(part), -1).contiguous().view(torch.uint8)
        padded = sent.new_zeros(max(sizes), sent.shape[1])
        padded[: len(sent)] = sent
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        joined = torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)])
        return joined.view(part.dtype).reshape(-1, *part.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.start : ctx.start + ctx.length], None, None
