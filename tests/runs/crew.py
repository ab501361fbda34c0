"""Processes of torch.distributed (gloo, on the CPU) that do one job after the other, as starting them takes long."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnunet_cfcl.runs.ranks import Ranks

SECONDS = 120
#: The server imports once what all processes need; they are forked from it, which has no threads that could be lost.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nnunet_cfcl.pretraining.methods", "nnunet_cfcl.pretraining.loop"])


class Crew:
    """``count`` ranks; call it with a function of a module and its arguments, the ranks are its first one."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        pipes = [CONTEXT.Pipe() for _ in range(count)]
        self._pipes = [own for own, _ in pipes]
        self._processes = [
            CONTEXT.Process(target=_serve, args=(rank, count, str(folder / f"store_{count}"), pipe), daemon=True)
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of all ranks, in their order."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(SECONDS), f"rank {rank} does not answer"
            done, result = pipe.recv()
            assert done, f"rank {rank}: {result}"
            results.append(result)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    join(rank, count, store)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(Ranks.current(), *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def join(rank: int, count: int, store: str) -> None:
    """Become a rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS)
    )
