"""Peak memory of one pretraining step by the number of images, with and without gradient caching.

    python benchmarks/pretraining_step_memory.py -d 4 -c 3d_fullres -device cpu

Every point is measured in a separate process: on a CPU as the growth of the peak resident size during the step, on a
GPU as the peak allocation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pretraining_setup import add_plan_arguments, make_trainer, prepared_pretraining, write_result


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure_here(arguments: argparse.Namespace) -> float:
    """Measure the MiB added by one step in this process, after a first step that allocates the optimiser's state."""
    trainer = make_trainer(arguments)
    images, cached = arguments.only
    passes = None if cached else 10**6
    with prepared_pretraining(trainer, 1, None) as prepared:
        prepared.pretraining.step(prepared.batch, 0)
    before = _peak_mib(trainer.device)
    with prepared_pretraining(trainer, images, passes) as prepared:
        prepared.pretraining.step(prepared.batch, 0)
    return _peak_mib(trainer.device) - before


def _measure(arguments: argparse.Namespace, images: int, cached: bool) -> float:
    same = ["-d", arguments.d, "-c", arguments.c, "-p", arguments.p, "-tr", arguments.tr, "-device", arguments.device]
    own = ["--threads", str(arguments.threads), "--only", str(images), str(int(cached))]
    command = [sys.executable, __file__, *same, *own]
    output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    value = json.loads(output.splitlines()[-1])["added_mib"]
    print(f"{images} images, {'cached gradients' if cached else 'one pass'}: {value:.0f} MiB more", flush=True)
    return float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_plan_arguments(parser)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--one-pass-images", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", type=int, nargs=2, metavar=("IMAGES", "CACHED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps({"added_mib": _measure_here(arguments)}))
        return
    cached = {images: _measure(arguments, images, True) for images in arguments.images}
    whole = {images: _measure(arguments, images, False) for images in arguments.one_pass_images}
    result = {"configuration": arguments.c, "device": arguments.device, "added_mib_cached": cached,
              "added_mib_one_pass": whole}
    write_result(arguments.out, f"pretraining_step_memory_{arguments.c}", result)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(list(cached), list(cached.values()), marker="o", label="cached gradients")
    axis.plot(list(whole), list(whole.values()), marker="o", label="one pass")
    axis.set(xlabel="images per step", ylabel="MiB above a step with one image", ylim=(0, None))
    axis.legend()
    figure.savefig(arguments.out / f"pretraining_step_memory_{arguments.c}.png", dpi=90)


if __name__ == "__main__":
    main()
