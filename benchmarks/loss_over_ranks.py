"""Cost per process of a contrastive loss shared by several processes: counted for 1 to 16, measured for 1 and 2.

Every process holds the embeddings of the whole batch, N points of width d, and visits its part of the blocks of pairs
(`nnunet_cfcl.losses.share_blocks`). With R processes, each of them computes matrix products of

    DVD-CL, one pair of views, N = B P:      4 products of N x N x d          forward 1, backward 3
    MVD-CL, a pool of all views, N = B V P:  2 products of N x N x d          forward 1/2, backward 3/2
                                             2 of N x N/B x (d + 2)           neighbours, forward and backward

divided by R, of 2 N N d floating point operations each. Dotted: these formulas. Points: operations of the process with
the most work, counted over the blocks that the kernels divide. Each process sends, in the ring algorithms of
all-gather (once the share (R - 1) / R of the gathered data) and all-reduce (twice), numbers of 4 bytes:

    DVD-CL:  2 N d gathered, 2 N sums and 2 N d gradients added up            4 * N (6 d + 4) (R - 1) / R bytes
    MVD-CL:  N d gathered, N sums, N d gradients, 2 N (d + 2) of neighbours   4 * N (7 d + 10) (R - 1) / R bytes

so the operations decrease with R and the bytes remain bounded. Not included: the network, which every process runs for
its own images, the gradients of its parameters, and work linear in N.

Measured: seconds of forward and backward in processes of one thread each (gloo, on this CPU), alone and shared in
turns within the same run. Run it on an otherwise idle machine with at least 2 cores:

    python benchmarks/loss_over_ranks.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nnunet_cfcl.losses import blockwise, dvd_cl_loss, mvd_cl_loss, share_blocks
from nnunet_cfcl.losses.blockwise import Block, rectangle_blocks, triangle_blocks
from nnunet_cfcl.losses.pair_rules import Neighbours
from nnunet_cfcl.losses.ranks import Share

OBJECTIVES, MEASURED, COUNTED = ("DVD-CL", "MVD-CL"), 2, range(1, 17)
OPERATIONS = {"DVD-CL": "4 · 2 N² d / R", "MVD-CL": "2 · 2 N² (d + (d + 2) / B) / R"}
BYTES = {"DVD-CL": "4 N (6 d + 4) (R - 1) / R", "MVD-CL": "4 N (7 d + 10) (R - 1) / R"}


@dataclass(frozen=True)
class Problem:
    """B images of V views with P points each, embedded in d dimensions."""

    batch: int
    views: int
    points: int
    width: int

    def samples(self, objective: str) -> int:
        """N, points on one side."""
        return self.batch * self.points * (self.views if objective == "MVD-CL" else 1)

    def step(self, objective: str) -> Callable[[], Tensor]:
        """Create a function that runs the loss forward and backward and returns value and gradient in one tensor."""
        torch.manual_seed(0)
        if objective == "MVD-CL":
            z = torch.randn(self.batch, self.views, self.points, self.width, requires_grad=True)
            positions = torch.rand(self.batch, self.views, self.points, 3)
            return lambda: _forward_and_backward(mvd_cl_loss(z, positions).loss, z)
        a, b = (torch.randn(self.batch, self.points, self.width, requires_grad=True) for _ in range(2))
        return lambda: _forward_and_backward(dvd_cl_loss(a, b).loss, a, b)


def _forward_and_backward(value: Tensor, *embeddings: Tensor) -> Tensor:
    gradients = torch.autograd.grad(value, embeddings)
    return torch.cat([value.detach().view(1), *(gradient.flatten() for gradient in gradients)])


def counted(objective: str, problem: Problem, ranks: int) -> dict[str, float]:
    """Count operations and bytes of the process with the most work, and the operations by the formula."""
    n, d, pool = problem.samples(objective), problem.width, objective == "MVD-CL"
    side = blockwise._side(n * n // 2 if pool else n * n, ranks)  # divided as in the kernels
    blocks = triangle_blocks(n, side) if pool else rectangle_blocks(n, n, side)
    strips = _neighbour_strips(problem, ranks) if pool else []
    return {
        "operations": max(_operations(Share(rank, ranks), blocks, strips, d, pool) for rank in range(ranks)),
        "formula": 2.0 * n * n * (2 * (d + (d + 2) / problem.batch) if pool else 4 * d) / ranks,
        "bytes": 4.0 * n * (7 * d + 10 if pool else 6 * d + 4) * (ranks - 1) / ranks,
    }


def _neighbour_strips(problem: Problem, ranks: int) -> list[Block]:
    size = problem.views * problem.points
    return Neighbours(torch.empty(problem.batch * size, 1), [size] * problem.batch, 0.1).strips(ranks)


def _operations(share: Share, blocks: Sequence[Block], strips: Sequence[Block], width: int, pool: bool) -> float:
    """Count the operations of a share of blocks.

    A block has one product forward, one backward, and one per gradient (a single gradient on the diagonal of a pool); a
    strip of neighbours has one forward and one backward.
    """
    products = sum(_pairs(block) * (3 if pool and block[0] == block[1] else 4) for block in share.mine(blocks))
    return 2.0 * (width * products + (width + 2) * 2 * sum(map(_pairs, share.mine(strips))))


def _pairs(block: Block) -> int:
    rows, columns = block
    pairs: int = (rows.stop - rows.start) * (columns.stop - columns.start)
    return pairs


def measured(problem: Problem, repeats: int) -> dict[str, Any]:
    """Measure with `MEASURED` processes; the first one reports the result."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, (folder, problem, repeats), nprocs=MEASURED)
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return found


def _measure(rank: int, folder: str, problem: Problem, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=MEASURED)
    result = {objective: _alone_and_shared(rank, problem.step(objective), repeats) for objective in OBJECTIVES}
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def _alone_and_shared(rank: int, step: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Time this process alone while the other waits, and both together, in turns, in seconds."""
    rounds: dict[str, list[dict[str, float]]] = {"1": [], "2": []}
    for _ in range(1 + repeats):
        dist.barrier()
        if rank == 0:
            clock, whole = _clocked(step)
            rounds["1"].append(clock)
        dist.barrier()
        with share_blocks():
            clock, shared = _clocked(step)
        rounds["2"].append(clock)
    if rank:
        return {}
    found: dict[str, Any] = {"repeats": repeats, "difference": float((whole - shared).abs().max() / whole.abs().max())}
    for key in ("seconds", "processor_seconds"):
        alone, both = ([row[key] for row in rounds[ranks][1:]] for ranks in rounds)  # the first round is a warm-up
        ratio = statistics.median(part / all_ for part, all_ in zip(both, alone, strict=True))
        found[key] = {"1": statistics.median(alone), "2": statistics.median(both), "ratio": ratio}
    return found


def _clocked(step: Callable[[], Tensor]) -> tuple[dict[str, float], Tensor]:
    wall, processor = time.perf_counter(), time.process_time()
    result = step()
    return {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}, result


def draw(result: dict[str, Any], file: Path) -> None:
    """Plot operations, bytes, and measured shares side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for position, (objective, color) in enumerate(zip(OBJECTIVES, ("tab:blue", "tab:orange"))):
        rows = result["counted"][objective]
        _curve(left, rows, "operations", 1e9, objective, color, marker="o", linestyle="none")
        _curve(left, rows, "formula", 1e9, OPERATIONS[objective], color, linestyle=":")
        _curve(middle, rows, "bytes", 2**20, f"{objective}: {BYTES[objective]}", color, marker="o")
        _bars(right, position, result["measured"][objective], color)
    left.set(yscale="log", ylabel="10⁹ operations per process", title="counted")
    middle.set(ylabel="MiB sent per process", title="counted", ylim=(0, None))
    right.set(ylabel="time shared by 2 / time alone", title="measured", ylim=(0, None))
    right.axhline(0.5, color="grey", linestyle=":", label="1/2")
    right.set_xticks(range(len(OBJECTIVES)), OBJECTIVES)
    for axes in (left, middle):
        axes.set_xlabel("processes R")
        axes.set_xticks((1, 2, 4, 8, 16))
    for axes in (left, middle, right):
        axes.legend(fontsize=7)
    figure.suptitle("Forward and backward: B {batch}, V {views}, P {points}, d {width}".format(**result["problem"]))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _curve(
    axes: Any, rows: Sequence[dict[str, float]], key: str, unit: float, label: str, color: str, **line: Any
) -> None:
    axes.plot(list(COUNTED), [row[key] / unit for row in rows], label=label, color=color, **line)


def _bars(axes: Any, position: int, found: dict[str, Any], color: str) -> None:
    for shift, clock, alpha in ((-0.2, "seconds", 1.0), (0.2, "processor_seconds", 0.5)):
        label = None if position else clock.replace("_", " ")
        bars = axes.bar(position + shift, found[clock]["ratio"], 0.38, color=color, alpha=alpha, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder for the JSON file and plot")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    problem = Problem(arguments.batch, arguments.views, arguments.points, arguments.width)
    result = {
        "problem": asdict(problem),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "measured": measured(problem, arguments.repeats),
        "counted": {objective: [counted(objective, problem, ranks) for ranks in COUNTED] for objective in OBJECTIVES},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "loss_over_ranks.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, arguments.out / "loss_over_ranks.png")
    print(json.dumps(result["measured"], indent=2))


if __name__ == "__main__":
    main()
