"""A complete, tiny task of the generator's training: images as bright as their scanner, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.generator import training as generator_training
from nnunet_cfcl.counterfactual.generator.data import case_quantiles
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae_planning import plan_sizes
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.runs.ranks import Ranks
from tests.conftest import CasesInMemory

SCANNER = Attribute("scanner", "binary", ("A", "B"))
DISEASE = Attribute("disease", "categorical", ("mild", "no", "yes"))
CODING = AttributeCoding((SCANNER, DISEASE))
INTERVENTIONS = (Intervention((SCANNER,)), Intervention((SCANNER, DISEASE)))
STRIDES = {2: [(1, 1), (2, 2), (2, 2)], 3: [(1, 1, 1), (2, 2, 2), (2, 2, 2)]}
TINY = {"epochs": 2, "iterations_per_epoch": 3, "images_per_step": 5, "width": 4, "blocks": 1, "warmup_steps": 2,
        "samples_every": 100, "parents_dropped": 0.0}
#: Intensities of nnU-Net's preprocessing: the darker scanner's and the difference of the two.
DARK, BRIGHTER = -1.0, 2.0


def tiny_cases(dim: int = 2, count: int = 12) -> tuple[CasesInMemory, dict[str, dict[str, str]]]:
    """Smooth textures; scanner B is brighter. Cases 0, 2, ... are of scanner A."""
    random, shape = np.random.default_rng(0), (1, 1, 18, 20) if dim == 2 else (1, 9, 10, 9)
    cells = {f"case_{n:02d}": {"scanner": "AB"[n % 2], "disease": DISEASE.values[n % 3]} for n in range(count)}
    images = {}
    for case, one in cells.items():
        texture = random.normal(size=shape).cumsum(-1).cumsum(-2)
        images[case] = 0.4 * texture / texture.std() + DARK + BRIGHTER * (one["scanner"] == "B")
    return CasesInMemory(images), cells


def tiny_task(folder: Path, ranks: Ranks = Ranks(), dim: int = 2, log: Callable[[str], Any] = print,  # noqa: B008
              images_per_pass: int = 5, **settings: Any) -> GeneratorTask:
    reader, cells = tiny_cases(dim)
    resolved = resolve_settings({f"generator.{name}": value for name, value in {**TINY, **settings}.items()})
    training, validation = reader.cases[:9], reader.cases[9:]
    sizes, _ = plan_sizes((16, 16) if dim == 2 else (8, 8, 8), STRIDES[dim], 1, CODING.width, resolved.generator)
    return GeneratorTask(
        reader=reader, cells=cells, training=training, validation=validation, coding=CODING,
        interventions=INTERVENTIONS, scale=IntensityScale.of_quantiles(case_quantiles(reader, training)), sizes=sizes,
        images_per_pass=images_per_pass, settings=resolved, spacing=(1.0,) * dim, device=torch.device("cpu"), workers=0,
        folder=folder, identity={"settings": resolved.to_dict()}, log=log, ranks=ranks)


@contextmanager
def quick() -> Iterator[None]:
    """Exact arithmetic whatever the processor, and no pictures, which take longest."""
    with (patch.object(generator_training, "computes_in_bfloat16", lambda device: False),
          patch.object(generator_training, "plot_generator_progress", lambda epochs, file: file.touch()),
          patch.object(generator_training, "draw_samples", lambda generator, task, file: file.touch())):
        yield


class Killed(Exception):
    """Simulated loss of the machine."""


def killed_in_its_second_epoch(training: Any) -> Any:
    """The training, which will not get through its second epoch."""
    steps = training._steps

    def run(number: int, data: Any, beat: Any) -> Any:
        if number == 1:
            training.step(next(data), number * training.settings.iterations_per_epoch)
            raise Killed
        return steps(number, data, beat)

    training._steps = run
    return training


def everything(training: Any) -> dict[str, torch.Tensor]:
    """All weights and buffers: the model's, the average's, the adversaries'."""
    parts = {"model": training.model, "average": training.average, "adversaries": training.adversaries}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}
