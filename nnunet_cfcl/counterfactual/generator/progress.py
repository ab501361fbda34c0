"""Pictures of the training of a generator: curves and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_cfcl.counterfactual.gate.contact_sheet import contact_sheet, sheet_of
from nnunet_cfcl.counterfactual.generator.data import draw_patches
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask

#: Number of cases in a picture of samples.
SAMPLES = 4
Lines = Sequence[Mapping[str, float]]
#: Title of every panel -> the curves in it.
PANELS: dict[str, Mapping[str, str]] = {
    "negative log likelihood, nats per voxel": {"nll": "training", "validation_nll": "validation"},
    "divergence of the codes, nats per voxel": {"kl": "training", "validation_kl": "validation"},
    "adversaries' loss (1: chance level)": {"code_adversary": "codes", "image_adversary": "decoded images"},
    "beta": {"beta": ""},
    "attribute predictor's loss on counterfactuals": {"predictor": ""},
    "learning rate": {"learning_rate": ""},
    "gradient norm before clipping": {"gradient_norm": ""},
    "images per second": {"images_per_second": ""},
}


def plot_generator_progress(epochs: Lines, file: Path) -> None:
    """Plot the curves of `PANELS` that the log has, and the divergence at every resolution, over the epochs, as PNG."""
    shown = [title for title, curves in PANELS.items() if any(key in line for key in curves for line in epochs)]
    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, -(-(len(shown) + 1) // 2)).flat)
    for panel, title in zip(panels, shown):
        _plot(panel, title, PANELS[title], epochs)
    levels = sorted({key for line in epochs for key in line if key.startswith("kl_")})
    curves = {key: key.removeprefix("kl_") for key in levels}
    _plot(panels[len(shown)], "divergence by resolution (0: finest)", curves, epochs)
    panels[len(shown)].set_yscale("log")
    for panel in panels[len(shown) + 1:]:
        panel.set_axis_off()
    figure.savefig(file, dpi=90, format="png")


def draw_samples(generator: CounterfactualGenerator, task: GeneratorTask, file: Path) -> None:
    """Draw original, reconstruction, counterfactuals and their differences of a few validation cases, as PNG."""
    patches = draw_patches(task.reader, task.cells, task.validation, generator.patch_size, 4 * SAMPLES,
                           task.settings.seed)
    sheet = sheet_of(generator, patches, task.interventions, SAMPLES, task.settings.seed)
    contact_sheet(sheet, task.spacing, file)


def _plot(panel: Axes, title: str, curves: Mapping[str, str], epochs: Lines) -> None:
    numbers = [line["epoch"] for line in epochs]
    for key, label in curves.items():
        values = [line.get(key, math.nan) for line in epochs]
        panel.plot(numbers, values, label=label, marker="." if len(epochs) < 50 else None)
    if any(curves.values()):
        panel.legend(fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("epoch", fontsize=8)
    panel.grid(alpha=0.3)
