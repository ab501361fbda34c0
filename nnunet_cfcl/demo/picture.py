"""Picture of the demo: one patient on both scanners as both models see it, and the Dice of all test patients."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nnunet_cfcl.chromap.picture import grey, overlay
from nnunet_cfcl.demo.recipe import PLUGIN, STOCK
from nnunet_cfcl.demo.results import Results, Shown

#: Colours of the labels, in order; further labels begin again.
LABELS = ("#4aa3ff", "#f0524f", "#ffd23f", "#6fdc8c", "#c792ea", "#ff9f43")
NAMES = {STOCK: "nnU-Net alone", PLUGIN: "nnU-Net + nnunet_cfcl"}
BARS = {STOCK: "#9aa0a6", PLUGIN: "#1a7f5a"}
SIZE, RESOLUTION = (16, 8.6), 100


def draw_demo(results: Results, picture: Path) -> None:
    """Draw the results."""
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(results), fontsize=21, fontweight="bold")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[6, 1.35])[:, 0]
    left, right = upper.subfigures(1, 2, squeeze=False, width_ratios=[3.1, 1], wspace=0.02)[0]
    _draw_cases(left, results)
    _draw_bars(right.subplots(), results)
    lower.text(0.02, 0.97, explanation(results), fontsize=12.5, va="top", linespacing=1.4)
    figure.savefig(picture, dpi=RESOLUTION, format="png")


def headline(results: Results) -> str:
    """Title with the Dice on the scanner without labels, or of all test cases."""
    group = next((name for name in results.cases if name != results.labelled_group), results.labelled_group)
    where = f"Scanner {group}, " + ("which has no labels" if group != results.labelled_group else "with labels")
    before, after = (results.dice[name][group] for name in (STOCK, PLUGIN))
    return f"{where if group else results.name}: Dice {before:.2f} with nnU-Net alone, {after:.2f} with nnunet_cfcl"


def explanation(results: Results) -> str:
    """What was trained on what."""
    images = "labelled cases" if results.own else "labelled images of scanner A (synthetic patients)"
    lines = [f"Both models: the same network, {results.labelled} {images}, the same number of optimiser steps."]
    for recipe, also in zip(results.recipes, ("", _also_seen(results)), strict=True):
        lines.append(f"{NAMES[recipe.name]}: {_minutes(results.seconds[recipe.name])}, {recipe.summary}{also}.")
    if results.in_3d:
        lines.append(f"3D: {results.in_3d.trainer} with 3d_fullres, {results.in_3d.summary} in "
                     f"{_minutes(results.seconds[results.in_3d.name])}, to show that it runs; far too short for masks.")
    return "\n".join(textwrap.fill(line, 178, subsequent_indent="      ") for line in lines)


def _also_seen(results: Results) -> str:
    pool = f" ({results.pool} unlabelled images{'' if results.own else ' of both scanners'})" if results.pool else ""
    if results.own:
        return f"{pool}; so few show that everything works, no more"
    return (f"{pool}. The counterfactuals (\"this patient, on the other scanner\") are the true ones, which only a "
            "phantom has; for real images a generator learns them")


def _patients(results: Results) -> str:
    counts = "/".join(str(count) for count in dict.fromkeys(results.cases.values()))
    return f"test cases: {counts}" if results.own else f"{counts} test patients"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _draw_cases(figure: Any, results: Results) -> None:
    axes = figure.subplots(len(results.shown), 5, squeeze=False)
    for row, (line, shown) in enumerate(zip(axes, results.shown, strict=True)):
        pictures = [grey(shown.image), *(coloured(shown, mask, results.labels) for mask in
                                         (shown.truth, shown.masks[STOCK], shown.masks[PLUGIN])), shown.chromap]
        titles = ["image", "truth", NAMES[STOCK], NAMES[PLUGIN].replace(" + ", "\n+ "), "CHRO-map of\nnnunet_cfcl"]
        under = ["", "", *(f"Dice {shown.dice[name]:.2f}" for name in (STOCK, PLUGIN)), ""]
        for axis, picture, title, text in zip(line, pictures, titles, under, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if picture is not None:
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            if row == 0:
                axis.set_title(title, fontsize=15)
            axis.set_xlabel(text, fontsize=15, fontweight="bold")
        line[0].set_ylabel(_row_title(results, shown.group), fontsize=15)
    names = [Patch(color=_colour(place), label=name) for place, name in enumerate(results.labels.values())]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=13, frameon=False)


def _row_title(results: Results, group: str) -> str:
    if not group:
        return ""
    return f"scanner {group}\n({'labels' if group == results.labelled_group else 'no labels'} in training)"


def coloured(shown: Shown, mask: NDArray[Any], labels: Any) -> NDArray[np.uint8]:
    """Lay the colours of a mask (Y, X) over the image; (Y, X, 3)."""
    colours = np.zeros((*mask.shape, 3), np.uint8)
    for place, value in enumerate(labels):
        colours[mask == value] = [round(255 * part) for part in to_rgb(_colour(place))]
    return overlay(grey(shown.image), colours, 0.6, mask > 0)


def _colour(place: int) -> str:
    return LABELS[place % len(LABELS)]


def _draw_bars(axis: Any, results: Results) -> None:
    groups, width = list(results.cases), 0.38
    for place, name in enumerate((STOCK, PLUGIN)):
        values = [results.dice[name][group] for group in groups]
        bars = axis.bar(np.arange(len(groups)) + (place - 0.5) * width, values, width * 0.94, label=NAMES[name],
                        color=BARS[name])
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=16, fontweight="bold", padding=2)
    axis.set_xticks(np.arange(len(groups)), [_row_title(results, group).replace(" in training", "") or "test cases"
                                             for group in groups], fontsize=15)
    axis.set_ylim(0, 1.1)
    axis.set_title(f"mean Dice ({_patients(results)})", fontsize=15)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=13, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
