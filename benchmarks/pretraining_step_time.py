"""Time of one pretraining step against nnU-Net's own training steps on the same number of patches, in one run.

    python benchmarks/pretraining_step_time.py -d 4 -c 3d_fullres -device cpu

A round is one pretraining step (V views of B images) and the nnU-Net training steps that cover the same number of
patches; both on loaded data. The ratio is computed per round, so that a busy machine slows both sides. The objective
alone (loss of the embeddings, forward and backward) is timed separately and subtracted. The lower bound of the ratio
is 1 with one pass, and 4/3 with cached gradients, which need one more forward pass (a backward pass costs two).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pretraining_setup import Prepared, add_plan_arguments, make_trainer, prepared_pretraining, write_result


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _objective_alone(prepared: Prepared) -> Callable[[], None]:
    pretraining = prepared.pretraining
    objective, device = pretraining.objective, pretraining.task.device
    count = sum(len(points) for points in objective.inputs(prepared.batch, pretraining.rows, device))
    drawn = {key: value.to(device) for key, value in prepared.batch["drawn"].items()}
    embeddings = torch.randn(count, pretraining.settings.projection_dim, device=device, requires_grad=True)
    return lambda: objective.loss(pretraining.model, embeddings, drawn)[0].backward()


def _views_alone(prepared: Prepared) -> Callable[[], None]:
    """Run the objective as often as a step does: in both passes of gradient caching."""
    pretraining = prepared.pretraining
    size, rows = pretraining.task.patches_per_pass, pretraining.rows
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    passes = 1 if len(chunks) == 1 else 2

    def render() -> None:
        for chunk in chunks * passes:
            pretraining.render(prepared.batch, chunk)

    return render


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Compute all results of a run as JSON, with times in seconds."""
    trainer = make_trainer(arguments)
    device = trainer.device
    loader = trainer.get_dataloaders()[0]
    supervised = next(loader)
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    patches = arguments.images * (trainer.settings.counterfactual.count + 1)
    supervised_steps = patches / trainer.batch_size
    rounds: dict[str, list[float]] = {"pretraining": [], "supervised": [], "objective": [], "views": []}
    for number in range(arguments.rounds + 1):
        with prepared_pretraining(trainer, arguments.images, arguments.patches_per_pass) as prepared:
            pretraining = prepared.pretraining
            if device.type == "cuda":  # the first step compiles
                pretraining.step(prepared.batch, 0)
            step = _seconds(lambda p=prepared: p.pretraining.step(p.batch, 0), device)
            objective = _seconds(_objective_alone(prepared), device)
            views = _seconds(_views_alone(prepared), device)
            passes = -(-patches // pretraining.task.patches_per_pass)
        whole = max(1, round(supervised_steps))
        own = _seconds(lambda n=whole: [trainer.train_step(supervised) for _ in range(n)], device)
        if number == 0:  # warm-up
            continue
        supervised_time = own * supervised_steps / whole
        found = {"pretraining": step, "supervised": supervised_time, "objective": objective, "views": views}
        for key, value in found.items():
            rounds[key].append(value)
        print(f"round {number}: " + ", ".join(f"{key} {value:.2f} s" for key, value in found.items()), flush=True)
    ratios = [(p - o) / s for p, o, s in zip(rounds["pretraining"], rounds["objective"], rounds["supervised"])]
    return {
        "configuration": arguments.c, "device": str(device), "threads": arguments.threads, "images": arguments.images,
        "views": trainer.settings.counterfactual.count + 1,
        "patch_size": list(trainer.configuration_manager.patch_size),
        "patches_per_pass": pretraining.task.patches_per_pass, "passes": passes, "batch_size": trainer.batch_size,
        "ratio": statistics.median(ratios), "ratios": ratios, "floor": 1.0 if passes == 1 else 4 / 3,
        "objective_share": statistics.median(o / p for o, p in zip(rounds["objective"], rounds["pretraining"])),
        "views_share": statistics.median(v / p for v, p in zip(rounds["views"], rounds["pretraining"])),
        "seconds": {key: statistics.median(values) for key, values in rounds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan_arguments(parser)
    parser.add_argument("--images", type=int, default=8, help="images per step B")
    parser.add_argument("--patches-per-pass", type=int, default=None, help="default: the plan's batch size")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    result = measure(arguments)
    write_result(arguments.out, f"pretraining_step_time_{arguments.c}_{result['passes']}_passes", result)


if __name__ == "__main__":
    main()
