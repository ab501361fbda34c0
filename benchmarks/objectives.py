"""Time and memory of the four objectives, forward and backward, for N = 1000 to 64,000 points.

    python benchmarks/objectives.py --out RESULTS

A run writes ``objectives.json``, ``objectives.md`` and ``objectives.png`` into RESULTS. Times are ratios to one N x N
x d matrix product into allocated memory, measured directly before and after each of them, so that other work on the
machine affects both alike; the result is the median over the repeats. Memory is measured in a separate process: the
peak of the whole process, and the part added by the step (on a GPU: peak allocation added by the step). The dense form
of the same loss (all pairs in matrices, float masks, log-softmax) is measured up to ``--dense-up-to`` points.

Floors, in products: two views need the logits once forward, again backward, and one product for each side's gradient:
4. A pool has a symmetric matrix: half forward, half again, one for the gradient: 2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_cfcl.losses import dvd_cl_loss, mvd_cl_loss, s_dvd_cl_loss, s_mvd_cl_loss

IMAGES, VIEWS, CLASSES, TEMPERATURE, RADIUS = 8, 4, 4, 0.7, 0.1
FLOORS = {"DVD-CL": 4.0, "S-DVD-CL": 4.0, "MVD-CL": 2.0, "S-MVD-CL": 2.0}
TARGET_PRODUCTS, TARGET_PROCESS_BYTES = 10.0, 1.5e9
DENSE_REPEATS = 3


@dataclass(frozen=True)
class Problem:
    """Problem of N embeddings of width d in each view (two views), or in all views together (pool)."""

    objective: str
    points: int
    width: int
    device: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, P) or (B, V, P)."""
        per_image = self.points // IMAGES
        return (IMAGES, VIEWS, per_image // VIEWS) if "MVD" in self.objective else (IMAGES, per_image)

    def step(self, dense: bool) -> Callable[[], Tensor]:
        """Create a function that computes loss and gradients once, on prepared data."""
        generator = torch.Generator().manual_seed(0)
        sides = 1 if "MVD" in self.objective else 2
        made = [torch.randn(*self.shape, self.width, generator=generator) for _ in range(sides)]
        leaves = [z.to(self.device).requires_grad_() for z in made]
        labels = torch.randint(CLASSES, self.shape, generator=generator).to(self.device)
        positions = torch.rand(*self.shape, 2, generator=generator).to(self.device)
        loss = (_dense if dense else _blockwise)(self.objective)

        def work() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            value = loss(leaves, labels, positions)
            value.backward()
            return torch.cat([value.detach()[None], *[leaf.grad.flatten() for leaf in leaves]])

        return work


def _blockwise(objective: str) -> Callable[[list[Tensor], Tensor, Tensor], Tensor]:
    return {
        "DVD-CL": lambda z, labels, positions: dvd_cl_loss(*z, TEMPERATURE).loss,
        "S-DVD-CL": lambda z, labels, positions: s_dvd_cl_loss(*z, labels, labels, TEMPERATURE).loss,
        "MVD-CL": lambda z, labels, positions: mvd_cl_loss(*z, positions, TEMPERATURE, RADIUS).loss,
        "S-MVD-CL": lambda z, labels, positions: s_mvd_cl_loss(*z, labels, TEMPERATURE).loss,
    }[objective]


def _dense(objective: str) -> Callable[[list[Tensor], Tensor, Tensor], Tensor]:
    def loss(z: list[Tensor], labels: Tensor, positions: Tensor) -> Tensor:
        sides = [torch.nn.functional.normalize(side.flatten(0, -2), dim=1) for side in z]
        positive = _dense_positives(objective, labels, positions)
        anchors = labels.flatten() > 0 if objective.startswith("S-") else torch.ones_like(labels.flatten()).bool()
        if len(sides) == 1:
            others = 1 - torch.eye(len(anchors), device=anchors.device)
            return _dense_direction(sides[0], sides[0], positive * others, others, anchors)
        everything = torch.ones_like(positive)
        return _dense_direction(*sides, positive, everything, anchors) + _dense_direction(
            *sides[::-1], positive, everything, anchors)

    return loss


def _dense_positives(objective: str, labels: Tensor, positions: Tensor) -> Tensor:
    count = labels.numel()
    if objective.startswith("S-"):
        return (labels.flatten()[:, None] == labels.flatten()).float()
    if objective == "DVD-CL":
        return torch.eye(count, device=labels.device)
    image = torch.arange(IMAGES, device=labels.device).repeat_interleave(count // IMAGES)
    # the other mode loses digits: pairs at the radius would change sides
    everywhere = positions.flatten(0, -2)
    near = torch.cdist(everywhere, everywhere, compute_mode="donot_use_mm_for_euclid_dist") < RADIUS
    return (near & (image[:, None] == image)).float()


def _dense_direction(x: Tensor, y: Tensor, positive: Tensor, candidates: Tensor, anchors: Tensor) -> Tensor:
    logits = x @ y.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_softmax = logits - torch.log((torch.exp(logits) * candidates).sum(dim=1, keepdim=True))
    counts = positive.sum(dim=1)
    losses = -(positive * log_softmax).sum(dim=1) / counts.clamp(min=1)
    return losses[anchors & (counts > 0)].mean()


def _seconds(work: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_time(problem: Problem, dense: bool, repeats: int) -> dict[str, float]:
    """Measure median seconds, and median, least and largest ratio to one product of this size."""
    x, y = torch.randn(2, problem.points, problem.width, device=problem.device)
    out = torch.empty(problem.points, problem.points, device=problem.device)
    job, rows = problem.step(dense), []
    torch.mm(x, y.T, out=out)
    job()
    for _ in range(repeats):
        before = _seconds(lambda: torch.mm(x, y.T, out=out), problem.device)
        own = _seconds(job, problem.device)
        rows.append((own, (before + _seconds(lambda: torch.mm(x, y.T, out=out), problem.device)) / 2))
    ratios = [own / product for own, product in rows]
    return {
        "seconds": statistics.median(own for own, _ in rows),
        "product_seconds": statistics.median(product for _, product in rows),
        "products": statistics.median(ratios), "least": min(ratios), "largest": max(ratios), "repeats": repeats,
    }


def measure_memory(problem: Problem, dense: bool) -> dict[str, int]:
    """Measure the peak of this process and the part of one step in bytes, after a warm-up on a small problem."""
    Problem(problem.objective, 64, problem.width, problem.device).step(dense)()
    job = problem.step(dense)
    if problem.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return {"process": _peak_bytes(), "added": torch.cuda.max_memory_allocated() - before}
    before = _peak_bytes()
    job()
    return {"process": _peak_bytes(), "added": _peak_bytes() - before}


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # the other counter starts with the peak of the parent process
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_in_a_fresh_process(problem: Problem, dense: bool, threads: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-of", problem.objective, str(problem.points), str(int(dense)),
               "--width", str(problem.width), "--device", problem.device, "--threads", str(threads)]
    found: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def relative_difference(problem: Problem) -> float:
    """Compute the largest difference of value and gradients between both forms, relative to the largest gradient."""
    ours, dense = problem.step(False)(), problem.step(True)()
    torch.testing.assert_close(ours[0], dense[0], rtol=1e-5, atol=0)
    return float((ours[1:] - dense[1:]).abs().max() / dense[1:].abs().max())


def measure(problem: Problem, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the result."""
    row: dict[str, Any] = {"objective": problem.objective, "points": problem.points, "shape": problem.shape,
                           "floor": FLOORS[problem.objective],
                           "memory": _memory_in_a_fresh_process(problem, False, arguments.threads)}
    with_dense = problem.points <= arguments.dense_up_to
    if with_dense:
        row["dense_memory"] = _memory_in_a_fresh_process(problem, True, arguments.threads)
        row["gradient_difference"] = relative_difference(problem)
        row["dense_time"] = measure_time(problem, True, DENSE_REPEATS)
    row["time"] = measure_time(problem, False, max(arguments.repeats, min(15, 64_000 // problem.points)))
    print(f"{problem.objective:9} N {problem.points:6}: {row['time']['products']:6.2f} products, "
          f"{row['time']['seconds']:8.3f} s, adds {row['memory']['added'] / 2**20:7.0f} MiB, "
          f"process {row['memory']['process'] / 2**20:7.0f} MiB", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| objective | N | products (least to largest) | floor | seconds | added MiB | process MiB | "
             "dense: products, added MiB |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        found, memory = row["time"], row["memory"]
        dense = (f"{row['dense_time']['products']:.0f}, {row['dense_memory']['added'] / 2**20:,.0f}"
                 if "dense_time" in row else "")
        lines.append(
            f"| {row['objective']} | {row['points']:,} | {found['products']:.1f} ({found['least']:.1f} to "
            f"{found['largest']:.1f}) | {row['floor']:.0f} | {found['seconds']:.3g} | {memory['added'] / 2**20:,.0f} | "
            f"{memory['process'] / 2**20:,.0f} | {dense} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot time in products and added memory over N, with dense forms dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, objective in enumerate(FLOORS):
        own = [row for row in rows if row["objective"] == objective]
        dense = [row for row in own if "dense_time" in row]
        style = {"color": f"C{number}", "marker": ".", "label": objective}
        left.plot([r["points"] for r in own], [r["time"]["products"] for r in own], **style)
        right.plot([r["points"] for r in own], [r["memory"]["added"] / 2**20 for r in own], **style)
        style = {"color": f"C{number}", "marker": ".", "linestyle": "--"}
        left.plot([r["points"] for r in dense], [r["dense_time"]["products"] for r in dense], **style)
        right.plot([r["points"] for r in dense], [r["dense_memory"]["added"] / 2**20 for r in dense], **style)
    for floor in sorted(set(FLOORS.values())):
        left.axhline(floor, color="grey", linestyle=":", linewidth=1)
    left.axhline(TARGET_PRODUCTS, color="tab:red", linewidth=1)
    left.set_ylabel("time, in N x N x d products\n(dotted: floors, red: bound, dashed: dense form)")
    right.set_ylabel("memory added by a step, MiB\n(dashed: dense form)")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="points N")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder of the results")
    parser.add_argument("--points", type=int, nargs="+", default=[1024, 2048, 4096, 8000, 16000, 32000, 64000])
    parser.add_argument("--objectives", nargs="+", default=list(FLOORS), choices=list(FLOORS))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="at least; small sizes are repeated up to 15 times")
    parser.add_argument("--dense-up-to", type=int, default=8000)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--memory-of", nargs=3, metavar=("OBJECTIVE", "N", "DENSE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        objective, points, dense = arguments.memory_of
        problem = Problem(objective, int(points), arguments.width, arguments.device)
        print(json.dumps(measure_memory(problem, bool(int(dense)))))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "threads": arguments.threads, "device": arguments.device,
             "width": arguments.width, "processor": platform.processor() or platform.machine(),
             "load_average_at_start": os.getloadavg()[0]}
    rows: list[dict[str, Any]] = []
    for points in arguments.points:
        for objective in arguments.objectives:
            rows.append(measure(Problem(objective, points, arguments.width, arguments.device), arguments))
            # written after every problem, so that a stopped run leaves its results
            result = {**about, "rows": rows}
            (arguments.out / "objectives.json").write_text(json.dumps(result, indent=2) + "\n")
            (arguments.out / "objectives.md").write_text(table(rows))
            draw(rows, arguments.out / "objectives.png")


if __name__ == "__main__":
    main()
