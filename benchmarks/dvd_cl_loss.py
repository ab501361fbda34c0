"""Time and memory of the DVD-CL loss, forward and backward, beside the dense form and one matrix product.

    python benchmarks/dvd_cl_loss.py --out RESULTS

One run writes ``dvd_cl_loss.json`` and ``dvd_cl_loss.png`` into RESULTS. Times are ratios to one N x N x d product into
memory that is already there, measured directly before and after each of them, so that other work on the machine
touches both alike; the median over the repeats counts. Memory is what one step adds to the peak resident memory
(``ru_maxrss``) of a process of its own.
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_cfcl.losses import dvd_cl_loss

TARGET_PRODUCTS = 10.0
TARGET_MEMORY_SHARE = 0.1
#: Forward 1, backward 3: the logits again and one for each gradient.
FLOOR_PRODUCTS = 4.0

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """B images, P points per image, embedding width d."""

    batch: int
    points: int
    width: int

    def embeddings(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Two views (B, P, d) that ask for gradients."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.points, self.width)
        a, b = (torch.randn(shape, generator=generator) for _ in range(2))
        return a.requires_grad_(), b.requires_grad_()


def dense_dvd_cl_loss(a: Tensor, b: Tensor, temperature: float = 0.7) -> Tensor:
    """The same loss as it is usually written: N x N logits, float masks and a log-softmax, once per direction."""
    x, y = (torch.nn.functional.normalize(z.flatten(0, 1), dim=1) for z in (a, b))
    return _dense_direction(x, y, temperature) + _dense_direction(y, x, temperature)


def _dense_direction(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    logits = x @ y.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    positives = torch.eye(len(x))
    candidates = torch.ones_like(logits)
    log_softmax = logits - torch.log((torch.exp(logits) * candidates).sum(dim=1, keepdim=True))
    return -((positives * log_softmax).sum(dim=1) / positives.sum(dim=1)).mean()


LOSSES: dict[str, Loss] = {"blockwise": dvd_cl_loss, "dense": dense_dvd_cl_loss}


def _step(loss: Loss, a: Tensor, b: Tensor) -> None:
    a.grad = b.grad = None
    loss(a, b).backward()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_times(problem: Problem, repeats: dict[str, int]) -> dict[str, dict[str, float]]:
    """Median seconds and median ratio to one product, for each loss and for the product into fresh memory."""
    a, b = problem.embeddings()
    x, y = a.detach().flatten(0, 1), b.detach().flatten(0, 1)
    out = torch.empty(len(x), len(x))

    product = partial(torch.mm, x, y.T, out=out)
    work: dict[str, Callable[[], object]] = {name: partial(_step, loss, a, b) for name, loss in LOSSES.items()}
    work["product into fresh memory"] = partial(torch.mm, x, y.T)
    return {name: _time_beside(product, job, repeats.get(name, 5)) for name, job in work.items()}


def _time_beside(product: Callable[[], object], job: Callable[[], object], repeats: int) -> dict[str, float]:
    product()
    job()
    rows = [(_seconds(product), _seconds(job), _seconds(product)) for _ in range(repeats)]
    ratios = [2 * own / (before + after) for before, own, after in rows]
    return {
        "seconds": statistics.median(own for _, own, _ in rows),
        "product_seconds": statistics.median((before + after) / 2 for before, _, after in rows),
        "products": statistics.median(ratios),
        "products_min": min(ratios),
        "products_max": max(ratios),
        "repeats": repeats,
    }


def added_peak_memory(loss: Loss, problem: Problem) -> int:
    """Bytes that one step adds to this process's peak; the libraries are warmed up on a small problem first."""
    _step(loss, *Problem(1, 64, problem.width).embeddings())
    a, b = problem.embeddings()
    before = _peak_resident_bytes()
    _step(loss, a, b)
    return _peak_resident_bytes() - before


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Added peak of each loss in bytes, each in a fresh process."""
    return {name: _memory_in_a_fresh_process(name, arguments) for name in LOSSES}


def _memory_in_a_fresh_process(name: str, arguments: argparse.Namespace) -> int:
    options = ("batch", "points", "width", "threads")
    command = [sys.executable, __file__, "--memory-of", name]
    command += [text for key in options for text in (f"--{key}", str(getattr(arguments, key)))]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def verify_equal(problem: Problem) -> float:
    """Check that both forms have one value; return their gradients' largest difference relative to the largest."""
    gradients = []
    values = []
    for loss in LOSSES.values():
        a, b = problem.embeddings()
        value = loss(a, b)
        gradients.append(torch.cat(torch.autograd.grad(value, (a, b))))
        values.append(value.item())
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def draw(result: dict, file: Path) -> None:
    """Two bar charts on a log scale: time and memory, with the targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(LOSSES)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
    _bars(left, names, [result["time"][n]["products"] for n in names], "products of N x N x d", TARGET_PRODUCTS)
    left.axhline(FLOOR_PRODUCTS, color="tab:green", linestyle=":", label=f"floor {FLOOR_PRODUCTS:g}")
    memory = [result["added_peak_bytes"][n] / 2**20 for n in names]
    _bars(right, names, memory, "added peak memory in MiB", TARGET_MEMORY_SHARE * memory[-1])
    for axes in (left, right):
        axes.legend(fontsize=8)
    problem = result["problem"]
    figure.suptitle("DVD-CL, forward and backward: B {batch}, P {points}, d {width}".format(**problem), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _bars(axes: Any, names: list[str], values: list[float], label: str, target: float) -> None:
    axes.bar_label(axes.bar(names, values, color=["tab:blue", "tab:grey"]), fmt=lambda value: f"{value:,.1f}")
    axes.axhline(target, color="tab:red", linestyle="--", label=f"target {target:,.0f}")
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.margins(y=0.2)


def run(arguments: argparse.Namespace, problem: Problem) -> dict:
    """Everything that is measured, with the verdict on both targets."""
    # Memory first: a child inherits the peak of the process that starts it.
    memory = measure_memory(arguments)
    difference = verify_equal(problem)
    times = measure_times(problem, {"blockwise": arguments.repeats, "dense": arguments.dense_repeats})
    products, share = times["blockwise"]["products"], memory["blockwise"] / memory["dense"]
    return {
        "problem": asdict(problem),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "processor": platform.processor() or platform.machine(),
        "time": times,
        "added_peak_bytes": memory,
        "gradient_difference": difference,
        "products": {"measured": products, "floor": FLOOR_PRODUCTS, "target": TARGET_PRODUCTS},
        "memory_share": {"measured": share, "target": TARGET_MEMORY_SHARE},
        "met": products <= TARGET_PRODUCTS and share <= TARGET_MEMORY_SHARE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder for the JSON file and plot")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="of the blockwise form")
    parser.add_argument("--dense-repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments.batch, arguments.points, arguments.width)
    if arguments.memory_of:
        print(added_peak_memory(LOSSES[arguments.memory_of], problem))
        return
    result = run(arguments, problem)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "dvd_cl_loss.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, arguments.out / "dvd_cl_loss.png")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
