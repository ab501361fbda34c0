"""Speed and memory of generating counterfactuals of whole cases.

    OMP_NUM_THREADS=1 python benchmarks/generator_speed.py -device cpu --threads 1

Speed: time of `SlidingWindowCounterfactuals` on whole cases (reading, generator, blending, clipping) relative to the
necessary passes of the model (per window one encoder pass, one decoder pass for the abduction and one per
intervention), measured as the model's own forward calls on the same windows in the same batches; for all interventions
together and for a single one. Every round measures both one after the other, so that a busy machine slows both; on a
CPU the ratio is that of CPU times, to which other jobs add little. Also measured: the same with the files of the store
written, and images per second of wall time.

Memory: peak resident size of a process that fills the store for one large volume, and its excess over a process that
has run one pass of the generator; on a GPU also its peak allocation. The weights are random, since neither speed nor
memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import Tensor

from nnunet_cfcl.counterfactual.generator.generation import Generation, generate_counterfactuals
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator, IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.whole_cases import CaseChange, SlidingWindowCounterfactuals
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pretraining_setup import write_result

SCANNER, DISEASE = Attribute("scanner", "categorical", ("A", "B", "C")), Attribute("disease", "binary", ("no", "yes"))
CODING = AttributeCoding((SCANNER, DISEASE))
INTERVENTIONS = (Intervention((SCANNER,)), Intervention((DISEASE,)), Intervention((SCANNER, DISEASE)))
CELLS = {"scanner": "A", "disease": "no"}


@dataclass(frozen=True)
class Setting:
    """Setting of a measurement: cases (Z, Y, X), patch and widths (fine to coarse) of the model, windows per pass."""

    cases: int
    shape: tuple[int, ...]
    patch: tuple[int, ...]
    widths: tuple[int, ...]
    per_pass: int

    def generator(self, device: str) -> CounterfactualGenerator:
        shapes = [tuple(n // 2**level for n in self.patch) for level in range(len(self.widths) - 1)]
        shapes.append((1,) * len(self.patch))
        levels = [Resolution(shape, width, 1, 1, 4, stochastic=level > 0)
                  for level, (shape, width) in enumerate(zip(shapes, self.widths))]
        torch.manual_seed(0)
        model = HVAE(HVAESizes(tuple(levels), parents=CODING.width, dropout=0.0, log_scale=None))
        one = torch.ones(1)
        return CounterfactualGenerator(model, CODING, IntensityScale(0 * one, one, -4 * one, 4 * one), {}, device)


SETTINGS = {
    "2d, large images": Setting(2, (1, 420, 360), (128, 128), (16, 32, 48, 64, 96, 128), 8),
    "2d, images of the patch's size": Setting(32, (1, 128, 128), (128, 128), (16, 32, 48, 64, 96, 128), 8),
    "3d": Setting(1, (80, 96, 80), (48, 48, 48), (8, 16, 32, 64, 96), 2),
}
LARGE = Setting(1, (256, 256, 256), (64, 64, 64), (8, 16, 32, 64, 96), 2)


def write_cases(folder: Path, setting: Setting) -> PreprocessedCases:
    """Write random cases in nnU-Net's preprocessed format."""
    random = np.random.default_rng(0)
    for number in range(setting.cases):
        image = random.normal(size=(1, *setting.shape)).astype(np.float32)
        chunks = (1, *(min(n, 64) for n in setting.shape))
        nnUNetDatasetBlosc2.save_case(
            image, np.zeros_like(image, np.int8), {}, str(folder / f"case_{number}"), chunks, chunks)
    return PreprocessedCases(str(folder), [f"case_{number}" for number in range(setting.cases)])


def asked(reader: PreprocessedCases, interventions: Sequence[Intervention]) -> list[CaseChange]:
    drawn = [{**CELLS, **one.draw(torch.Generator(), CELLS)} for one in interventions]
    others = torch.stack([CODING.encode(cells) for cells in drawn])
    return [CaseChange(case, CODING.encode(CELLS), others) for case in reader.cases]


def unavoidable(
    generator: CounterfactualGenerator, batches: Sequence[Tensor], change: CaseChange
) -> Callable[[], None]:
    """Run the model's own passes over prepared windows."""
    model, device = generator.model, generator.device

    @torch.no_grad()
    def work() -> None:
        for seen in batches:
            parents = change.parents.expand(len(seen), -1).to(device)
            others = change.others[:, None].expand(-1, len(seen), -1).to(device)
            with generator._autocast():
                codes = model.decoder(parents, model.encoder(seen)).codes
                for after in others:
                    model.decode(codes, after)

    return work


def window_batches(
    generator: CounterfactualGenerator, reader: PreprocessedCases, setting: Setting
) -> Iterator[Tensor]:
    """List the windows of all cases, in the order and batches of `SlidingWindowCounterfactuals`."""
    blender = SlidingWindowCounterfactuals(generator, reader, SlidingWindows(setting.patch), setting.per_pass, False)
    windows = (window.image for change in asked(reader, INTERVENTIONS) for window in blender._windows_of(change))
    while batch := list(islice(windows, setting.per_pass)):
        yield generator.scale.forward(torch.stack(batch).to(generator.device))


def seconds(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall time, and CPU time over all cores; on a GPU both are wall time."""
    if device == "cuda":
        torch.cuda.synchronize()
    started, busy = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter() - started
    return clock, clock if device == "cuda" else time.process_time() - busy


def measure_speed(name: str, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compute medians over the rounds as JSON, with times in seconds."""
    generator = setting.generator(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        reader = write_cases(Path(folder), setting)
        batches = list(window_batches(generator, reader, setting))
        blender = SlidingWindowCounterfactuals(generator, reader, SlidingWindows(setting.patch), setting.per_pass,
                                               False)
        found = {what: _rounds(f"{name}, {what}", blender, batches, interventions, arguments)
                 for what, interventions in (("together", INTERVENTIONS), ("single", INTERVENTIONS[:1]))}
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    return {"cases": setting.cases, "shape": setting.shape, "patch_size": setting.patch, "parameters": parameters,
            "windows": sum(map(len, batches)), "windows_per_pass": setting.per_pass, **found}


def _rounds(
    name: str, blender: SlidingWindowCounterfactuals, batches: Sequence[Tensor], interventions: Sequence[Intervention],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    changes = asked(blender.reader, interventions)
    wanted = Generation("benchmark", tuple(interventions))
    cells = {change.case: CELLS for change in changes}
    works: dict[str, Callable[[], object]] = {
        "passes": unavoidable(blender.generator, batches, changes[0]),
        "blended": lambda: [slab.images for slab in blender.slabs(changes)],
    }
    times: dict[str, list[tuple[float, float]]] = {"passes": [], "blended": [], "stored": []}
    for number in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            works["stored"] = lambda to=folder: generate_counterfactuals(
                blender, cells, wanted, Path(to) / "plans", print)
            found = {what: seconds(work, arguments.device) for what, work in works.items()}
        line = ", ".join(f"{part} {busy:.2f} s" for part, (_, busy) in found.items())
        print(f"{name}, round {number}: {line}", flush=True)
        for what, value in found.items():
            times[what] += [value] if number else []  # the first round is a warm-up
    ratios = {what: [one / passes for (_, one), (_, passes) in zip(times[what], times["passes"])]
              for what in ("blended", "stored")}
    clock, busy = ({what: statistics.median(value[kind] for value in values) for what, values in times.items()}
                   for kind in (0, 1))
    images = len(changes) * len(interventions)
    return {"interventions": len(interventions), "ratio": statistics.median(ratios["blended"]),
            "ratios": ratios["blended"], "ratio_with_files": statistics.median(ratios["stored"]),
            "images_per_second": images / clock["blended"], "images_per_second_with_files": images / clock["stored"],
            "seconds": clock, "processor_seconds": busy}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory_here(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory of this process in MiB after one pass of the generator, and after storing a whole volume."""
    folder, setting = Path(arguments.only), replace(LARGE, shape=(arguments.size,) * 3)
    generator = setting.generator(arguments.device)
    reader = PreprocessedCases(str(folder / "plans"), ["case_0"])
    (change,) = asked(reader, INTERVENTIONS)
    images = torch.zeros(setting.per_pass, 1, *setting.patch)
    generator.changes(images, change.parents.expand(len(images), -1),
                      [one.expand(len(images), -1) for one in change.others])
    before = _peak_mib()
    blender = SlidingWindowCounterfactuals(generator, reader, SlidingWindows(setting.patch), setting.per_pass, False)
    started = time.perf_counter()
    store = generate_counterfactuals(
        blender, {"case_0": CELLS}, Generation("benchmark", INTERVENTIONS), folder / "plans", print,
        lambda case: ((1, 64, 64, 64), (1, 64, 64, 64)))
    taken, after = time.perf_counter() - started, _peak_mib()
    store.check({"case_0": reader.shape("case_0")})
    found = {"after_one_pass": before, "peak": after, "added": after - before, "seconds": taken,
             "one_volume": float(np.prod(reader.shape("case_0"))) * 4 / 2**20}
    if arguments.device == "cuda":
        found["peak_on_device"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure memory in a separate process, which has never held the volume."""
    setting = replace(LARGE, shape=(arguments.size,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plans").mkdir()
        write_cases(Path(folder) / "plans", setting)
        command = [sys.executable, __file__, "-device", arguments.device, "--threads", str(arguments.threads),
                   "--size", str(arguments.size), "--only", folder]
        output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    return {"shape": setting.shape, "patch_size": setting.patch, "windows_per_pass": setting.per_pass,
            "interventions": len(INTERVENTIONS), "mib": json.loads(output.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="voxels of the large volume along each axis")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder of the results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        print(json.dumps(measure_memory_here(arguments)))
        return
    speed = {name: measure_speed(name, setting, arguments) for name, setting in SETTINGS.items()}
    worst = max(speed[name][what]["ratio"] for name in speed for what in ("together", "single"))
    result = {"device": arguments.device, "threads": arguments.threads, "worst_ratio": worst, "asked": 1.2,
              "speed": speed}
    write_result(arguments.out, f"generator_speed_{arguments.device}", result)
    # last, since it takes longest
    write_result(arguments.out, f"generator_memory_{arguments.device}", measure_memory(arguments))


if __name__ == "__main__":
    main()
