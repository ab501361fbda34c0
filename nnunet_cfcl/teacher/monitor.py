"""Pictures of phase 3: its curves, and pseudo-labels of a few images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from nnunet_cfcl.files.figure_text import names_as_they_are
from nnunet_cfcl.teacher.pseudo_labels import PseudoLabels

#: Title of a panel -> its curves, as keys of the log or prefixes of keys.
PANELS: Mapping[str, tuple[str, ...]] = {
    "losses": ("loss", "pool_loss"),
    "voxels of the pool with a label": ("known", "known_"),
    "classes' shares of these": ("share_",),
    "student and teacher disagree (foreground)": ("disagreement",),
    "pseudo Dice of the result (validation)": ("dice",),
    "weight of the pool's loss": ("weight",),
    "learning rate": ("learning_rate",),
    "gradient norm before clipping": ("gradient_norm",),
}


@names_as_they_are
def plot_progress(epochs: Sequence[Mapping[str, float]], file: Path) -> None:
    """Plot the curves of `PANELS` over the epochs as PNG."""
    with style.context("default"):  # nnU-Net sets large fonts for its own plots
        _plot_progress(epochs, file)


def _plot_progress(epochs: Sequence[Mapping[str, float]], file: Path) -> None:
    figure = Figure(figsize=(16, 7), layout="constrained")
    FigureCanvasAgg(figure)
    keys = list(dict.fromkeys(key for line in epochs for key in line))
    for panel, (title, wanted) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
        shown = [key for key in keys if any(key == one or one.endswith("_") and key.startswith(one) for one in wanted)]
        for key in shown:
            name = next((key.removeprefix(one) for one in wanted if one.endswith("_") and key.startswith(one)), key)
            panel.plot([line["epoch"] for line in epochs], [line.get(key, math.nan) for line in epochs],
                       marker="." if len(epochs) < 50 else None, label=name.replace("_", " "))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("epoch", fontsize=8)
        panel.grid(alpha=0.3)
        if len(shown) > 1:
            panel.legend(fontsize=7)
        if title.startswith("classes"):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")
    figure.savefig(file, dpi=90, format="png")


def plot_pseudo_labels(weak: Tensor, strong: Tensor, pseudo: PseudoLabels, file: Path) -> None:
    """Draw weak view, strong view, pseudo-labels and unknown voxels of N patches as PNG.

    Args:
        weak, strong: (N, C, *patch); the first channel is drawn, of volumes the slice with most foreground.
        pseudo: labels of the N patches.
        file: picture to write.
    """
    with style.context("default"):
        _plot_pseudo_labels(weak, strong, pseudo, file)


def _plot_pseudo_labels(weak: Tensor, strong: Tensor, pseudo: PseudoLabels, file: Path) -> None:
    figure = Figure(figsize=(12, 3 * len(weak)), layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("image (teacher)", "counterfactual (student)", "pseudo-label", "without a label")
    for row, axes in enumerate(figure.subplots(len(weak), 4, squeeze=False)):
        labels = pseudo.labels[row].float().sum(0).cpu()
        unknown = ~pseudo.known[row].all(0).cpu()
        images = [weak[row, 0].float().cpu(), strong[row, 0].float().cpu(), labels, unknown.float()]
        if labels.ndim == 3:
            place = int((labels > 0).sum((1, 2)).argmax())
            images = [one[place] for one in images]
        for axis, image, title in zip(axes, images, titles):
            is_label = title == titles[2]
            axis.imshow(image.numpy(), cmap="nipy_spectral" if is_label else "gray", interpolation="nearest",
                        **({"vmin": 0} if is_label or title == titles[3] else {}))
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=80, format="png")
