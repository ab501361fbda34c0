"""Error of the generator's counterfactuals on the phantom, whose true counterfactuals are known.

Trains a generator on phantom patients (2 scanners x disease) and compares its counterfactuals of other patients with
the rendered truth. Errors are mean absolute differences of intensities as nnU-Net preprocesses them (8 bit in 2D and 12
bit in 3D, then z-scored image by image), relative to the error of the unchanged image. Two lower bounds are reported:
the error of the true change without the acquisition's noise (the optimum of a generator of smooth changes), and that
of the true change after a Gaussian blur of one voxel.

    python benchmarks/generator_phantom.py --dim 2 --out benchmark_results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pretraining_setup import write_result
from scipy import ndimage
from torch import Tensor

from nnunet_cfcl.config import Settings, resolve_settings
from nnunet_cfcl.counterfactual.gate.evaluation import judge
from nnunet_cfcl.counterfactual.gate.report import write_report
from nnunet_cfcl.counterfactual.generator.data import case_quantiles, draw_patches, split_patients
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator, IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae_planning import plan_sizes
from nnunet_cfcl.counterfactual.generator.interventions import default_interventions
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask
from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining
from nnunet_cfcl.counterfactual.generator.whole_cases import CaseChange, SlidingWindowCounterfactuals
from nnunet_cfcl.data.attributes import infer_attributes
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.phantom.dataset import LEVELS, Case, phantom_cases, quantise
from nnunet_cfcl.phantom.scm import DEFAULT_SPACING, Attributes, intervene, render
from nnunet_cfcl.runs.epoch_log import read_log

#: Plan of nnU-Net for the phantom's default sizes, 96 x 96 and 40 x 56 x 56; in 3D with smaller patches, of which two
#: cores process enough in the available time.
PATCH = {2: (96, 96), 3: (24, 32, 32)}
STRIDES = {2: [[1, 1]] + [[2, 2]] * 4, 3: [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]}
#: Settings for two cores and forty minutes; the defaults are meant for a GPU.
SETTINGS: dict[int, dict[str, Any]] = {
    2: {"generator": {"width": 12, "blocks": 1, "images_per_step": 8, "epochs": 32, "iterations_per_epoch": 100,
                      "ema": 0.998, "mirror_axes": [1]}},
    3: {"generator": {"width": 16, "blocks": 1, "images_per_step": 8, "epochs": 33, "iterations_per_epoch": 60,
                      "ema": 0.998, "mirror_axes": [2]}},
}
Array = NDArray[np.float32]


def normalised(image: Array, reference: Array | None = None) -> Array:
    """Quantise and z-score as nnU-Net does; with the mean and std of ``reference`` where it is given."""
    both = (image, image if reference is None else reference)
    stored = [quantise(one).astype(np.float32) / LEVELS[one.ndim] for one in both]
    return (stored[0] - stored[1].mean()) / max(float(stored[1].std()), 1e-8)


@dataclass(frozen=True)
class Rendered:
    """Rendered patient, normalised: image, mask, and true counterfactuals of every intervention.

    Counterfactuals are given with and without noise; both are z-scored with the statistics of the noisy images.
    """

    name: str
    attributes: Attributes
    image: Array
    mask: NDArray[np.uint8]
    truth: dict[str, Array]
    noiseless_change: dict[str, Array]


def rendered(case: Case) -> Rendered:
    """Render a case and its counterfactuals."""
    patient, factual = case.patient, case.attributes
    silent = replace(patient, acquisition=replace(patient.acquisition, white=np.zeros_like(patient.acquisition.white)))

    def both(attributes: Attributes) -> tuple[Array, Array, NDArray[np.uint8]]:
        noisy = render(patient, attributes.scanner, attributes.disease)
        quiet = render(silent, attributes.scanner, attributes.disease).image
        return normalised(noisy.image), normalised(quiet, noisy.image), noisy.mask

    image, quiet, mask = both(factual)
    truth, change = {}, {}
    for name in ("scanner", "disease"):
        truth[name], quiet_after, _ = both(intervene(factual, name))
        change[name] = quiet_after - quiet
    return Rendered(case.name, factual, image, mask, truth, change)


class PhantomReader:
    """Rendered phantom cases as a `CaseReader`."""

    def __init__(self, cases: Sequence[Rendered]) -> None:
        self.images = {one.name: one.image if one.image.ndim == 3 else one.image[None] for one in cases}
        self.masks = {one.name: one.mask if one.mask.ndim == 3 else one.mask[None] for one in cases}
        self.cases = self.known = self.labelled = tuple(sorted(self.images))

    def shape(self, case: str) -> tuple[int, ...]:
        """(1, Z, Y, X)."""
        return (1, *self.images[case].shape)

    def read(self, case: str, box: tuple[slice, ...]) -> Array:
        """(1, z, y, x)."""
        return self.images[case][box][None]

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """The true mask, certain."""
        mask = self.masks[case][box].astype(np.int16)
        return mask, np.full_like(mask, 100)


def make_task(cases: Sequence[Rendered], dim: int, settings: Settings, folder: Path, device: str) -> GeneratorTask:
    """Create the generator's training on these patients."""
    reader = PhantomReader(cases)
    cells = {one.name: cells_of(one) for one in cases}
    columns = {name: {case: cells[case][name] for case in cells} for name in ("scanner", "disease")}
    coding, _ = infer_attributes(columns, reader.cases)
    groups = {case: tuple(one.values()) for case, one in cells.items()}
    training, validation = split_patients(
        reader.cases, {}, groups, settings.generator.validation_share, settings.seed)
    sizes, fitting = plan_sizes(PATCH[dim], STRIDES[dim], 1, coding.width, settings.generator)
    return GeneratorTask(
        reader=reader, cells=cells, training=training, validation=validation, coding=coding,
        interventions=default_interventions(coding, columns, training),
        scale=IntensityScale.of_quantiles(case_quantiles(reader, training)), sizes=sizes, images_per_pass=fitting,
        settings=settings, spacing=DEFAULT_SPACING[dim], device=torch.device(device), workers=0, folder=folder,
        identity={"phantom": dim, "settings": settings.to_dict(), "cases": len(cases)}, log=print)


def images_of(cases: Sequence[Rendered]) -> Tensor:
    """(N, 1, *S)."""
    return torch.stack([torch.from_numpy(one.image)[None] for one in cases])


def cells_of(one: Rendered) -> dict[str, str]:
    """Attribute -> value of a case."""
    return {"scanner": one.attributes.scanner, "disease": one.attributes.disease}


def generated(generator: CounterfactualGenerator, cases: Sequence[Rendered], name: str) -> Tensor:
    """Generate counterfactuals (N, 1, *S) with the value of attribute ``name`` flipped, as phase 0 does."""
    reader = PhantomReader(cases)
    blender = SlidingWindowCounterfactuals(generator, reader, SlidingWindows(generator.patch_size), 4,
                                           zero_is_outside=False)
    jobs = [CaseChange(one.name, generator.coding.encode(cells_of(one)), generator.coding.encode(
        {**cells_of(one), name: getattr(intervene(one.attributes, name), name)})[None]) for one in cases]
    planes: dict[str, list[Tensor]] = {}
    for slab in blender.slabs(jobs):
        planes.setdefault(slab.case, []).append(slab.images[0])
    return torch.stack([torch.cat(planes[one.name], 1).view(1, *one.image.shape) for one in cases])


def compare(generator: CounterfactualGenerator, cases: Sequence[Rendered], name: str) -> dict[str, float]:
    """Compute the errors of an intervention relative to the unchanged image, and their lower bounds."""
    images = images_of(cases)
    truth = torch.stack([torch.from_numpy(one.truth[name])[None] for one in cases])
    nothing = float((images - truth).abs().mean())
    made = generated(generator, cases, name)
    quiet = images + torch.stack([torch.from_numpy(one.noiseless_change[name])[None] for one in cases])
    smooth = images + torch.stack([torch.from_numpy(ndimage.gaussian_filter(one.truth[name] - one.image, 1.0))[None]
                                   for one in cases])
    errors = {"relative_mae": made, "floor_noiseless": quiet, "floor_smooth": smooth}
    return {"nothing_mae": nothing, **{key: float((one - truth).abs().mean()) / nothing for key, one in errors.items()}}


def added_disease(generator: CounterfactualGenerator, cases: Sequence[Rendered]) -> dict[str, float]:
    """Locate the change of adding the disease.

    Returns mean absolute changes inside the lungs and elsewhere in the body, and the share of the change within two
    voxels of the lungs.
    """
    images = images_of(cases)
    change = (generated(generator, cases, "disease") - images).abs().numpy()[:, 0]
    lungs = np.stack([one.mask == 1 for one in cases])
    near = np.stack([ndimage.binary_dilation(lung, iterations=2) for lung in lungs])
    return {"change_in_lungs": float(change[lungs].mean()), "change_elsewhere": float(change[~near].mean()),
            "share_in_lungs": float(change[near].sum() / max(float(change.sum()), 1e-12))}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dim", type=int, choices=(2, 3), default=2)
    parser.add_argument("--patients", type=int, help="default 240 in 2D, 160 in 3D; a fifth is used for validation")
    parser.add_argument("--test-patients", type=int, help="default 60 in 2D, 24 in 3D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, changes of the section generator")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    return parser.parse_args()


def measure(
    generator: CounterfactualGenerator, task: GeneratorTask, test: Sequence[Rendered], folder: Path
) -> dict[str, Any]:
    """Compute all metrics on test patients, with the gate's report."""
    ill = [one for one in test if one.attributes.disease != "none"]
    well = [one for one in test if one.attributes.disease == "none"]
    reader, size, seed = PhantomReader(test), generator.patch_size, task.settings.seed
    held_out = draw_patches(reader, {one.name: cells_of(one) for one in test}, reader.cases, size, 2 * len(test), seed)
    learned = draw_patches(task.reader, task.cells, task.training, size, 3 * len(task.training), seed + 1)
    report = judge(generator, learned, held_out, task.interventions,
                   replace(task.settings.gate, cases=len(held_out)), seed)
    write_report(folder, report, generator, held_out, task.interventions, task.spacing)
    found: dict[str, Any] = {
        "scanner": compare(generator, test, "scanner"), "disease_removed": compare(generator, ill, "disease"),
        "disease_added": added_disease(generator, well)}
    for name, scanner in (("scanner_a_to_b", "A"), ("scanner_b_to_a", "B")):
        found[name] = compare(generator, [one for one in test if one.attributes.scanner == scanner], "scanner")
    for one, verdict in zip(report.interventions, report.verdicts):
        found.setdefault(one.name, {}).update(
            effectiveness=min(effect.share or 0.0 for effect in one.effectiveness),
            accuracy_on_real=min(effect.accuracy or 0.0 for effect in one.effectiveness),
            reversibility=one.reversibility, dice_ratio=one.dice_ratio, gate=verdict.summary)
    return {**found, "composition": report.composition}


def main() -> None:
    """Train, compare, write the metrics and the plots."""
    arguments = parse_arguments()
    dim, out = arguments.dim, arguments.out
    torch.set_num_threads(arguments.threads)
    out.mkdir(parents=True, exist_ok=True)
    count = arguments.patients or {2: 240, 3: 160}[dim]
    test_count = arguments.test_patients or {2: 60, 3: 24}[dim]
    with ProcessPoolExecutor(arguments.threads) as pool:
        # test patients of another seed: those of seed 0 were used during development
        cases, test = (list(pool.map(rendered, phantom_cases(number, seed, dim, test=is_test)))
                       for number, seed, is_test in (
                           (count, arguments.seed, False), (test_count, arguments.seed + 1, True)))
    own = {**SETTINGS[dim], "seed": arguments.seed}
    own["generator"] = {**own["generator"], **arguments.settings}
    settings_file = out / f"generator_phantom_{dim}d_settings.json"
    settings_file.write_text(json.dumps(own, indent=1))
    folder = out / f"generator_phantom_{dim}d"
    task = make_task(cases, dim, resolve_settings(None, settings_file), folder, arguments.device)
    finished = GeneratorTraining.final_in(folder)
    if not finished.exists():
        GeneratorTraining(task).run(resume=True)
    generator = CounterfactualGenerator.load(finished, arguments.device)
    minutes = sum(line["seconds"] for line in read_log(folder / "log.jsonl")) / 60
    # both dimensions share one file
    result_file = out / "generator_phantom.json"
    results = json.loads(result_file.read_text()) if result_file.exists() else {}
    results[f"{dim}d"] = {
        **measure(generator, task, test, folder / "report"), "patients": count, "training_minutes": minutes,
        "threads": arguments.threads, "device": arguments.device, "settings": own}
    write_result(out, "generator_phantom", results)


if __name__ == "__main__":
    main()
