"""The gate's report as files: JSON, a Markdown page and two figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_cfcl.counterfactual.gate.cases import JudgedGenerator
from nnunet_cfcl.counterfactual.gate.contact_sheet import contact_sheet, sheet_of
from nnunet_cfcl.counterfactual.gate.results import (
    AttributeMetrics,
    GateReport,
    Histogram,
    InterventionMetrics,
    TargetMetrics,
)
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.files.atomic import replace_atomically, write_text_atomically
from nnunet_cfcl.files.figure_text import names_as_they_are

REPORT, PAGE, SHEET, FIGURES = "report.json", "report.md", "contact_sheet.png", "figures.png"
#: Number of rows of the contact sheet.
ROWS = 8
#: Number of groups per intervention whose histograms are drawn, those with the most counterfactuals.
TARGETS_SHOWN = 4
COLOURS = {"originals": "#7f7f7f", "counterfactuals": "#d95f02", "real": "#1b9e77"}

LEGEND = """\
- **effectiveness**: fraction of counterfactuals that an independent network classifies as their new value, with its
  accuracy on real images in brackets. **kept**: fraction of counterfactuals that it classifies like their originals in
  the attributes that should not change.
- **reversibility**: difference from the original after the intervention and its inverse, relative to the change; 0 is
  perfect.
- **anatomy**: Dice of a small segmentation network on the counterfactuals, with the originals' labels, relative to its
  Dice on the originals (1: equal); without labels, correlation of the edges of original and counterfactual (in
  brackets: of images of different patients).
- **distance**: distance of the counterfactuals' intensities to real images of the target group, relative to the
  originals' distance; 0 is perfect, 1 is no improvement.
- **change**: mean change of the intensities in standard deviations, and fraction of voxels that change visibly.
- **composition**: change of the images when no attribute is changed. **reconstruction**: detail of an image that the
  generator's reconstruction lacks; the counterfactuals keep it."""


def write_report(
    folder: Path, report: GateReport, generator: JudgedGenerator, held_out: Patches,
    interventions: Sequence[Intervention], spacing: Sequence[float],
) -> None:
    """Write `REPORT`, `PAGE`, `SHEET` and `FIGURES` into a folder, each atomically.

    Args:
        folder: folder of the report, created if missing.
        report: report of `judges.evaluate`.
        generator: the evaluated generator.
        held_out: held-out patches, `ROWS` of which are shown.
        interventions: the evaluated interventions.
        spacing: (D,) in mm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheet = sheet_of(generator, held_out, interventions, ROWS, report.seed)
    contact_sheet(sheet, spacing, folder / SHEET, "Counterfactuals of held-out patients")
    draw_figures(report, folder / FIGURES)
    write_text_atomically(folder / PAGE, page(report))
    write_text_atomically(folder / REPORT, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")


def page(report: GateReport) -> str:
    """The report as a Markdown page."""
    columns = ("intervention", "used", "effectiveness", "kept", "reversibility", "anatomy", "distance", "change")
    rows = [columns, ("---",) * len(columns),
            *(_row(one, verdict.passed) for one, verdict in zip(report.interventions, report.verdicts))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    verdicts = "\n".join(
        f"- **{one.name}**: {verdict.summary}." for one, verdict in zip(report.interventions, report.verdicts))
    limits = ", ".join(f"{name} {report.settings[name]:g}" for name in (
        "effectiveness", "predictability", "composition", "reversibility", "anatomy", "structure", "distance"))
    return (
        "# Quality of the counterfactual generator\n\n"
        f"Evaluated on {report.images} images of {report.cases} held-out cases, with networks trained on "
        f"{report.training_cases} other cases. {len(report.passed)} of {len(report.interventions)} interventions "
        "passed.\n\n"
        f"{table}\n\nComposition {_text(report.composition, 3)}, reconstruction {_text(report.reconstruction, 3)} "
        f"(standard deviations).\n\n## Verdicts\n\n{verdicts}\n\n## Metrics\n\n{LEGEND}\n\n"
        f"Limits: {limits}. `{SHEET}` shows examples, `{FIGURES}` effectiveness and intensities, `{REPORT}` contains "
        "all metrics.\n")


def _row(one: InterventionMetrics, passed: bool) -> tuple[str, ...]:
    anatomy = _text(one.dice_ratio) if one.dice_ratio is not None else (
        f"{_text(one.structure)} ({_text(one.structure_unrelated)})")
    return (one.name, "yes" if passed else "**no**", _shares(one.effectiveness), _shares(one.kept),
            _text(one.reversibility), anatomy, _text(one.distance_ratio),
            f"{_text(one.change)}, {'-' if one.changed_share is None else f'{one.changed_share:.0%}'}")


def _shares(attributes: Sequence[AttributeMetrics]) -> str:
    return ", ".join(f"{one.attribute} {_text(one.share)} ({_text(one.accuracy)})" for one in attributes) or "-"


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@names_as_they_are
def draw_figures(report: GateReport, file: Path) -> None:
    """Draw effectiveness beside the accuracy on real images, and the intensities of every intervention, as PNG."""
    judged = [one for one in report.interventions if one.targets]
    columns = max([1, *(min(TARGETS_SHOWN, len(one.targets)) for one in judged)])
    figure = Figure(figsize=(max(9, 3.1 * columns), 3.2 + 2.4 * len(judged)), layout="constrained")
    FigureCanvasAgg(figure)
    bands = figure.subfigures(1 + len(judged), 1, height_ratios=[3.2, *[2.4] * len(judged)], squeeze=False)[:, 0]
    _bars(bands[0].subplots(), report)
    for band, one in zip(bands[1:], judged):
        channel, channels = _most_distant_channel(one.targets), len(one.targets[0].histograms)
        title = f"{one.name}: intensities" + (f" of channel {channel}" if channels > 1 else "")
        band.suptitle(title, fontsize=9, x=0.01, ha="left", weight="bold")
        _histograms(band.subplots(1, columns, squeeze=False)[0], one.targets, channel)
    replace_atomically(file, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _bars(axes: Axes, report: GateReport) -> None:
    changed = [(f"{metrics.attribute}\nchanged by\n{one.name}", metrics)
               for one in report.interventions for metrics in one.effectiveness]
    kept = [(f"{metrics.attribute}\nkept by\n{one.name}", metrics)
            for one in report.interventions for metrics in one.kept]
    shown = [metrics for _, metrics in changed + kept]
    # a gap between changed and kept attributes
    places = np.arange(len(shown)) + np.where(np.arange(len(shown)) < len(changed), 0.0, 0.6)
    shares, reals = ([getattr(metrics, name) or 0.0 for metrics in shown] for name in ("share", "accuracy"))
    axes.bar(places - 0.2, shares, 0.38, color=COLOURS["counterfactuals"], label="counterfactuals")
    axes.bar(places + 0.2, reals, 0.38, color=COLOURS["real"], label="real images")
    for place, value in [*zip(places - 0.2, shares), *zip(places + 0.2, reals)]:
        axes.text(place, value + 0.01, f"{value:.2f}", ha="center", fontsize=7)
    for number, (place, real) in enumerate(zip(places, reals)):
        axes.hlines(report.settings["effectiveness"] * real, place - 0.42, place + 0.02, color="black", linewidth=1.2,
                    label="" if number else "lower limit")
    axes.set_xticks(places, [label for label, _ in changed + kept], fontsize=8)
    axes.set(ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
    axes.set_title("Fraction classified as expected by an independent network", fontsize=10, loc="left")
    if shown:
        axes.legend(fontsize=7, ncols=3, loc="upper right")


def _most_distant_channel(targets: Sequence[TargetMetrics]) -> int:
    """Channel whose originals differ most from the real images of the group, or without any from counterfactuals."""
    channels = len(targets[0].histograms)
    return max(range(channels), key=lambda channel: sum(_overlap_missing(one.histograms[channel]) for one in targets))


def _overlap_missing(one: Histogram) -> float:
    other = one.counterfactuals if one.real is None else one.real
    return float(np.abs(np.subtract(one.originals, other)) @ np.diff(one.edges))


def _histograms(panels: Sequence[Axes], targets: Sequence[TargetMetrics], channel: int) -> None:
    shown = sorted(targets, key=lambda target: -target.counterfactuals)[:TARGETS_SHOWN]
    for panel, target in zip(panels, shown):
        _histogram(panel, target, channel)
    for panel in panels[len(shown):]:
        panel.set_axis_off()
    panels[0].legend(fontsize=7)


def _histogram(axes: Axes, target: TargetMetrics, channel: int) -> None:
    one = target.histograms[channel]
    for name, density in (("originals", one.originals), ("counterfactuals", one.counterfactuals), ("real", one.real)):
        if density is not None:
            label = "real images of the group" if name == "real" else name
            axes.stairs(np.sqrt(density), one.edges, color=COLOURS[name], label=label, fill=name == "real",
                        alpha=0.45 if name == "real" else 1.0, linewidth=1.3)
    new_values = ", ".join(f"{name} {value}" for name, value in target.values.items())
    axes.set_title(f"to {new_values}\n({target.counterfactuals} images, {target.real} real)", fontsize=8)
    # space for the legend
    axes.set(yticks=[], ylim=(0, 1.5 * axes.dataLim.y1))
    axes.set_ylabel("density, square root", fontsize=7)
    axes.tick_params(labelsize=7)
