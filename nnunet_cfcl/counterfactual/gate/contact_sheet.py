"""Contact sheet of counterfactuals: one row per image with every intervention's counterfactual and difference."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from nnunet_cfcl.counterfactual.gate.cases import (
    JudgedGenerator,
    balanced_choice,
    intervene,
    reconstructions_of,
)
from nnunet_cfcl.counterfactual.gate.image_pairs import channel_std
from nnunet_cfcl.counterfactual.generator.data import Cells, Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.figure_text import names_as_they_are

#: Longer side of a panel, gap between panels, space above a row and left of the panels, in inches.
PANEL, GAP, HEAD, SIDE = 1.45, 0.06, 0.22, 1.4
#: Characters per line of a row's title.
LINE = 19
#: Space above the first row and right of the last column, in inches.
TOP, RIGHT = 0.75, 0.85
#: Fraction of voxels whose change exceeds the colour scale.
BEYOND = 0.005


@dataclass(frozen=True)
class Sheet:
    """Images of N cases, all (N, C, *S) float32 on the CPU.

    Attributes:
        originals: original images.
        titles: titles of the N rows.
        counterfactuals: name of the intervention -> counterfactuals.
        captions: name of the intervention -> new values of the N images as text.
        reconstructions: the generator's reconstructions, without the residual; None: not shown.
    """

    originals: Tensor
    titles: tuple[str, ...]
    counterfactuals: Mapping[str, Tensor]
    captions: Mapping[str, tuple[str, ...]]
    reconstructions: Tensor | None = None


def sheet_of(
    generator: JudgedGenerator, patches: Patches, interventions: Sequence[Intervention], count: int, seed: int
) -> Sheet:
    """Choose up to ``count`` images, balanced over groups, and compute their counterfactuals.

    Args:
        generator: generator of counterfactuals.
        patches: patches to choose from.
        interventions: interventions, two columns each.
        count: largest number of rows.
        seed: seed of the choice and of the new values.
    """
    chosen = balanced_choice(patches, generator.coding, count, seed)
    changed = {one.name: intervene(generator, chosen, one, (seed, number)) for number, one in enumerate(interventions)}
    captions = {one.name: tuple(_values_text(cells, [attribute.name for attribute in one.attributes])
                                for cells in changed[one.name].cells) for one in interventions}
    names = [attribute.name for attribute in generator.coding.attributes]
    titles = tuple(f"{case}\n{_values_text(cells, names)}" for case, cells in zip(chosen.cases, chosen.cells))
    return Sheet(chosen.images, titles, {name: one.counterfactuals for name, one in changed.items()}, captions,
                 reconstructions_of(generator, chosen))


def _values_text(cells: Cells, names: Sequence[str]) -> str:
    """Known values of the named attributes, one per line."""
    return "\n".join(f"{name} {cells[name]}" for name in names if cells.get(name))


class Panel(NamedTuple):
    """Slice (Y, X), its caption, and whether it is a difference image."""

    picture: np.ndarray
    caption: str = ""
    difference: bool = False


@names_as_they_are
def contact_sheet(sheet: Sheet, spacing: Sequence[float], file: Path, title: str = "") -> None:
    """Draw the sheet as PNG, written atomically.

    All images of a row share one grey window, all differences of the sheet one colour scale. A volume is represented by
    the slice with the most contrast in its middle half, several channels by the channel that changes most.

    Args:
        sheet: images and texts.
        spacing: (D,) in mm, for the pixels' aspect ratio.
        file: path of the PNG.
        title: title of the sheet.
    """
    channel = most_changed_channel(sheet)
    rows = [_panels(sheet, row, channel) for row in range(len(sheet.titles))]
    limit = _colour_limit([panel.picture for row in rows for panel in row if panel.difference])
    height, width = _panel_size(sheet.originals.shape[-2:], spacing)
    figure = Figure(figsize=(SIDE + len(rows[0]) * (width + GAP) + RIGHT, TOP + len(rows) * (height + HEAD) + 0.1))
    FigureCanvasAgg(figure)
    across, up = figure.get_size_inches()
    shown: AxesImage | None = None
    for number, row in enumerate(rows):
        window = _grey_window(row)
        bottom = up - TOP - (number + 1) * (height + HEAD)
        figure.text(0.08 / across, (bottom + height / 2) / up, _wrapped(sheet.titles[number]), fontsize=7, va="center")
        for column, panel in enumerate(row):
            left = SIDE + column * (width + GAP)
            axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
            drawn = _draw(axes, panel, window, limit, spacing[-2] / spacing[-1])
            shown = drawn if panel.difference else shown
    _headings(figure, sheet, width, title, channel)
    if shown is not None:
        _colour_bar(figure, shown)
    replace_atomically(file, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _wrapped(title: str) -> str:
    """Wrap the title, since long names of cases would overlap the images."""
    return "\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, LINE) or [""])


def most_changed_channel(sheet: Sheet) -> int:
    """Index of the channel with the largest mean change in units of its standard deviation."""
    if not sheet.counterfactuals:
        return 0
    changes = torch.stack([(images - sheet.originals).abs().transpose(0, 1).flatten(1).mean(1)
                           for images in sheet.counterfactuals.values()])
    return int((changes.mean(0) / channel_std(sheet.originals)).argmax())


def _panels(sheet: Sheet, row: int, channel: int) -> list[Panel]:
    original = sheet.originals[row, channel]
    place = slice_with_most_contrast(original)

    def cut(images: Tensor) -> np.ndarray:
        picture = images[row, channel]
        return np.asarray(picture if place is None else picture[place])

    panels = [Panel(cut(sheet.originals))]
    if sheet.reconstructions is not None:
        panels.append(Panel(cut(sheet.reconstructions)))
    for name, images in sheet.counterfactuals.items():
        caption = "to " + sheet.captions[name][row].replace("\n", ", ")
        panels += [Panel(cut(images), caption), Panel(cut(images - sheet.originals), difference=True)]
    return panels


def slice_with_most_contrast(volume: Tensor) -> int | None:
    """Index of the slice with the largest standard deviation in the middle half of a volume (Z, Y, X); None in 2D."""
    if volume.ndim == 2:
        return None
    first = len(volume) // 4
    return first + int(volume[first : len(volume) - first].flatten(1).std(1, correction=0).argmax())


def _grey_window(row: Sequence[Panel]) -> tuple[float, float]:
    """Common 0.5 to 99.5 percentile window of all images of the row, so that changes of brightness are visible."""
    values = np.concatenate([panel.picture.ravel() for panel in row if not panel.difference])
    low, high = np.quantile(values, [0.005, 0.995])
    return float(low), float(max(high, low + 1e-6))


def _colour_limit(differences: Sequence[np.ndarray]) -> float:
    if not differences:
        return 1.0
    return max(float(np.quantile(np.abs(np.stack(differences)), 1 - BEYOND)), 1e-6)


def _panel_size(shape: Sequence[int], spacing: Sequence[float]) -> tuple[float, float]:
    """Height and width of a panel in inches, with the patient's aspect ratio."""
    extent = [n * step for n, step in zip(shape, spacing[-2:])]
    return PANEL * extent[0] / max(extent), PANEL * extent[1] / max(extent)


def _draw(axes: Axes, panel: Panel, window: tuple[float, float], limit: float, aspect: float) -> AxesImage:
    low, high = (-limit, limit) if panel.difference else window
    drawn = axes.imshow(panel.picture, cmap="RdBu_r" if panel.difference else "gray", vmin=low, vmax=high,
                        interpolation="nearest", aspect=aspect)
    axes.set_title(panel.caption, fontsize=6.5, pad=2)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#bbbbbb", linewidth=0.5)
    return drawn


def _headings(figure: Figure, sheet: Sheet, width: float, title: str, channel: int) -> None:
    named = ["original", *(["reconstruction"] if sheet.reconstructions is not None else [])]
    for name in sheet.counterfactuals:
        named += [name, "difference"]
    across, up = figure.get_size_inches()
    for column, name in enumerate(named):
        middle = SIDE + column * (width + GAP) + width / 2
        figure.text(middle / across, 1 - 0.68 / up, name, fontsize=8, ha="center", weight="bold")
    channels = sheet.originals.shape[1]
    shown = title + (f" (channel {channel} of 0 to {channels - 1})" if channels > 1 else "")
    figure.text(0.08 / across, 1 - 0.32 / up, shown, fontsize=10)


def _colour_bar(figure: Figure, shown: AxesImage) -> None:
    across, up = figure.get_size_inches()
    long = min(2.5, up - TOP - HEAD - 0.2)
    axes = figure.add_axes((1 - (RIGHT - 0.1) / across, (up - TOP - HEAD - long) / up, 0.12 / across, long / up))
    figure.colorbar(shown, cax=axes, extend="both")
    axes.tick_params(labelsize=6)
    axes.set_ylabel("counterfactual - original", fontsize=6.5)
