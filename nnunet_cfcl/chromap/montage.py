"""Montage of a CHRO-map: slices in three planes, in grey and in colour, with colour wheel, legend and scale bar."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from contourpy import contour_generator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from nnunet_cfcl.chromap.nifti import Geometry
from nnunet_cfcl.chromap.picture import grey, grey_window, overlay, write_png
from nnunet_cfcl.chromap.slices import informative_slices, labels_of

DPI = 100
#: Room for all panels of a row and for all rows, and the longest side of a panel, in pixels.
ACROSS, DOWN, LONGEST = 1260, 1080, 460
#: Margin, gap between an image and its colours, between pairs, room above a row and for its caption, in pixels.
MARGIN, SEAM, GAP, HEAD, CAPTION = 22, 3, 18, 26, 130
#: Height of a line and width of a letter of the title, line of the legend, width of the side and its wheel, in pixels.
LINE, LETTER, LEGEND, SIDE, WHEEL = 24, 13, 21, 220, 180
BACKGROUND, INK, FAINT = "#15171b", "#f2f2f2", "#a9adb5"
#: Dashes of the outlines of labels, in ascending order of the labels.
DASHES = ("solid", (0, (4, 2)), (0, (1, 1.4)), (0, (6, 1.6, 1, 1.6)))
#: Halo and colour of an outline: together they contrast with every hue of the map.
TWO_TONES = (("black", "white"), ("white", "black"))
#: Number of labels with an outline of their own; the legend names no more.
NAMED = len(DASHES) * len(TWO_TONES)
#: Distance between slices that nnU-Net's readers give for a picture, which has neither slices nor mm.
NO_SPACING = 999.0
#: Name of a plane, and the directions at its left, right and upper edge.
PLANES = (("axial", "R", "L", "A"), ("coronal", "R", "L", "S"), ("sagittal", "A", "P", "S"))


class _Volume(NamedTuple):
    """Arrays (Z, Y, X) turned to superior, posterior, left."""

    image: NDArray[Any]
    colors: NDArray[np.uint8]
    inside: NDArray[np.bool_] | None
    mask: NDArray[Any] | None
    #: (z, y, x) in mm.
    spacing: tuple[float, ...]
    #: For each axis the axis of the given arrays, and whether it was reversed.
    axes: tuple[int, ...]
    flipped: tuple[bool, ...]
    #: Whether the directions in the patient are known.
    placed: bool


class _Row(NamedTuple):
    """Slices of one plane; panels are (width, height) pixels large."""

    axis: int
    places: tuple[int, ...]
    width: int
    height: int


def write_montage(
    file: str | os.PathLike[str], image: NDArray[Any], colors: NDArray[np.uint8], inside: NDArray[np.bool_] | None,
    mask: NDArray[Any] | None, spacing: Sequence[float], wheel: NDArray[Any], title: str, alpha: float = 0.5, *,
    geometry: Geometry | None = None, labels: Mapping[int, str] | None = None, per_plane: int = 3,
) -> None:
    """Draw informative slices of a volume in the three planes as PNG, atomically; safe in a thread.

    Every slice is shown in grey and, beside it, under its colours with the outlines of the mask. All panels
    have the same scale and one grey window. Superior is up, in axial slices anterior. A plane in which slices are one
    voxel thin is left out.

    Args:
        file: path of the picture.
        image: (Z, Y, X), numbers of any kind.
        colors: (Z, Y, X, 3) uint8.
        inside: (Z, Y, X), True where there are colours; None: everywhere.
        mask: (Z, Y, X) integers, 0 is background; None: no outlines.
        spacing: (z, y, x) in mm; (999, y, x) means a picture in pixels, as in nnU-Net.
        wheel: (size, size, 4) RGBA uint8 or float in [0, 1], the colour wheel.
        title: title of the montage, best one line.
        alpha: share of the colours, 0 to 1.
        geometry: position in the patient: the arrays are turned, and the edges of the slices are named. None: the
            arrays run to superior, posterior and left, as those of an image without direction, and no edges are named.
        labels: names of the mask's labels for the legend.
        per_plane: number of slices per plane.

    Raises:
        ValueError: shapes that do not fit, or an empty volume.
    """
    volume = _turned(image, colors, inside, mask, spacing, geometry)
    rows = _rows(volume, per_plane)
    present = [] if mask is None else labels_of(mask)
    pitch = max(CAPTION, *(2 * row.width + SEAM for row in rows)) + GAP
    right = MARGIN + pitch * max(len(row.places) for row in rows)
    lines = textwrap.wrap(title, (right + SIDE - 2 * MARGIN) // LETTER) or [""]
    head = MARGIN + LINE * len(lines) + HEAD
    below = sum(row.height + HEAD for row in rows) - HEAD
    page = _Page(right + SIDE, head + max(below, _height_of_side(present)) + MARGIN)
    page.write(MARGIN, MARGIN - 6, "\n".join(lines), 14, INK, weight="bold")
    unit = "pixels" if image.shape[0] == 1 and spacing[0] == NO_SPACING else "mm"
    _draw_side(page, right, head, wheel, present, labels or {}, _scale(volume, rows[0]), unit)
    window = grey_window(image)
    for row in rows:
        _draw_row(page, volume, row, head, pitch, window, alpha, present)
        head += row.height + HEAD
    write_png(file, page.pixels())


class _Page:
    """Canvas with coordinates in pixels from the upper left corner.

    One pair of axes for everything: a pair for every panel takes longer than all drawing.
    """

    def __init__(self, across: int, down: int) -> None:
        figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI, facecolor=BACKGROUND)
        self._canvas = FigureCanvasAgg(figure)
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, across), ylim=(down, 0), autoscale_on=False)
        self.axes.set_axis_off()

    def write(self, left: float, down: float, words: str, points: float, colour: str, **style: Any) -> None:
        """Write text with its upper left corner at a place, unless the style sets another alignment."""
        # a name with dollar signs is no formula
        style = {"va": "top", "parse_math": False, **style}
        self.axes.text(left, down, words, fontsize=points, color=colour, **style)

    def show(self, left: float, down: float, width: float, height: float, picture: NDArray[Any]) -> None:
        """Fill a box with a picture (Y, X) grey, (Y, X, 3) or (Y, X, 4), uint8 or float in [0, 1]."""
        self.axes.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect="auto",
                         extent=(left, left + width, down + height, down))

    def curves(self, curves: Sequence[Any], colour: str, width: float, style: Any) -> None:
        """Draw lines through points (N, 2), x and y in pixels, width in points."""
        self.axes.add_collection(LineCollection(curves, colors=colour, linewidths=width, linestyles=[style]),
                                 autolim=False)

    def pixels(self) -> NDArray[np.uint8]:
        """Pixels (Y, X, 3); only the upper 6 bits are kept, as invisible noise in the lower ones is half of a file."""
        self._canvas.draw()
        drawn = np.asarray(self._canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
        # the highest bits are put in the place of the lowest, so that white stays white
        coarse: NDArray[np.uint8] = drawn & np.uint8(0xFC) | drawn >> np.uint8(6)
        return coarse


def _turned(
    image: NDArray[Any], colors: NDArray[np.uint8], inside: NDArray[np.bool_] | None, mask: NDArray[Any] | None,
    spacing: Sequence[float], geometry: Geometry | None,
) -> _Volume:
    shapes = [one.shape for one in (colors[..., 0], inside, mask) if one is not None]
    if image.ndim != 3 or not image.size or colors.shape[-1:] != (3,) or any(one != image.shape for one in shapes):
        found = (image.shape, colors.shape, *shapes[1:])
        raise ValueError(f"expected arrays (Z, Y, X) and colours (Z, Y, X, 3), found {found}")
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"expected three positive lengths of a voxel in mm, found {tuple(spacing)}")
    order, flipped = ((0, 1, 2), (False,) * 3) if geometry is None else geometry.axes_towards_lps()
    reverse = tuple(slice(None, None, -1) if flip else slice(None) for flip in flipped)

    def turn(array: NDArray[Any]) -> NDArray[Any]:
        return array.transpose(*order, *range(3, array.ndim))[reverse]

    return _Volume(turn(image), turn(colors), None if inside is None else turn(inside),
                   None if mask is None else turn(mask), tuple(float(spacing[axis]) for axis in order), order, flipped,
                   geometry is not None)


def _extents(volume: _Volume, axis: int) -> tuple[float, float]:
    """Width and height of a slice in mm."""
    height, width = (volume.image.shape[k] * volume.spacing[k] for k in range(3) if k != axis)
    return width, height


def _rows(volume: _Volume, per_plane: int) -> list[_Row]:
    """Slices of the planes, all in the scale in which everything fits."""
    flat = [any(volume.image.shape[k] == 1 for k in range(3) if k != axis) for axis in range(3)]
    # a line or a point is drawn, too
    axes = [axis for axis in range(3) if not flat[axis]] or [0]
    places = [informative_slices(volume.colors, volume.inside, volume.mask, axis, per_plane) for axis in axes]
    extents = [_extents(volume, axis) for axis in axes]
    pairs = max(len(found) for found in places)
    scale = min(
        (ACROSS / pairs - SEAM - GAP) / (2 * max(width for width, _ in extents)),
        DOWN / sum(height for _, height in extents),
        LONGEST / max(max(extent) for extent in extents),
    )
    return [_Row(axis, found, max(2, round(width * scale)), max(2, round(height * scale)))
            for axis, found, (width, height) in zip(axes, places, extents)]


def _scale(volume: _Volume, row: _Row) -> float:
    """Pixels per mm, by the longer side."""
    width, height = _extents(volume, row.axis)
    return row.width / width if width > height else row.height / height


def _slice(array: NDArray[Any], axis: int, place: int) -> NDArray[Any]:
    """Slice in viewing direction: superior or anterior on top."""
    shown = array[(slice(None),) * axis + (place,)]
    return shown if axis == 0 else shown[::-1]


def _draw_row(
    page: _Page, volume: _Volume, row: _Row, down: int, pitch: int, window: tuple[float, float], alpha: float,
    present: Sequence[int],
) -> None:
    source = "zyx"[volume.axes[row.axis]]
    for number, place in enumerate(row.places):
        left, beside = MARGIN + number * pitch, MARGIN + number * pitch + row.width + SEAM
        shown = grey(_slice(volume.image, row.axis, place), window)
        colors = _slice(volume.colors, row.axis, place)
        inside = None if volume.inside is None else _slice(volume.inside, row.axis, place)
        page.show(left, down, row.width, row.height, shown)
        page.show(beside, down, row.width, row.height, overlay(shown, colors, alpha, inside))
        if volume.mask is not None:
            _outline(page, beside, down, row, _slice(volume.mask, row.axis, place), present)
        if volume.placed:
            _name_edges(page, left, down, row)
        if volume.image.shape[row.axis] == 1:
            # for example an X-ray, which is not axial
            continue
        original = volume.image.shape[row.axis] - 1 - place if volume.flipped[row.axis] else place
        page.write(left, down - 5, f"{PLANES[row.axis][0]}, {source} = {original}", 9, FAINT, va="baseline")


def _outline(page: _Page, left: int, down: int, row: _Row, mask: NDArray[Any], present: Sequence[int]) -> None:
    """Draw the outlines of the labels in a panel, each in its own style."""
    height, width = mask.shape
    # a label that reaches the edge is closed by the background beyond it
    framed = np.pad(mask, 1)
    across = left + (np.arange(width + 2) - 0.5) * row.width / width
    below = down + (np.arange(height + 2) - 0.5) * row.height / height
    found = {label: contour_generator(across, below, (framed == label).astype(np.float32)).lines(0.5)
             for label in np.unique(mask[mask > 0]).tolist()}
    styles = [_style(present.index(label)) for label in found]
    # below all of the dashes, also where two labels meet
    for curves, (ground, _, _) in zip(found.values(), styles):
        page.curves(curves, ground, 2.6, "solid")
    for curves, (_, colour, dash) in zip(found.values(), styles):
        page.curves(curves, colour, 1.2, dash)


def _style(number: int) -> tuple[str, str, Any]:
    """Ground, colour and dash of the outline of the n-th label."""
    ground, colour = TWO_TONES[number // len(DASHES) % len(TWO_TONES)]
    return ground, colour, DASHES[number % len(DASHES)]


def _name_edges(page: _Page, left: int, down: int, row: _Row) -> None:
    """Name the directions at the left, right and upper edge of a panel that has room for them."""
    if min(row.width, row.height) < 60:
        return
    halo = [withStroke(linewidth=2, foreground="black")]
    middle = (left + row.width / 2, down + row.height / 2)
    where = ((left + 4, middle[1], "left", "center"), (left + row.width - 4, middle[1], "right", "center"),
             (middle[0], down + 4, "center", "top"))
    for name, (x, y, horizontal, vertical) in zip(PLANES[row.axis][1:], where):
        page.write(x, y, name, 8, INK, ha=horizontal, va=vertical, path_effects=halo)


def _height_of_side(present: Sequence[int]) -> int:
    legend = LEGEND * (1 + min(len(present), NAMED + 1)) + GAP if present else 0
    return WHEEL + 70 + legend + 40


def _draw_side(
    page: _Page, left: int, down: int, wheel: NDArray[Any], present: Sequence[int], labels: Mapping[int, str],
    scale: float, unit: str,
) -> None:
    """Draw the wheel with its meaning, the legend of the outlines and the scale bar, one below the other."""
    page.show(left, down, WHEEL, WHEEL, wheel)
    page.write(left, down + WHEEL + 12, "same colour =\nsame representation", 11, INK, weight="bold", linespacing=1.3)
    down += WHEEL + 70
    if present:
        down = _draw_legend(page, left, down, present, labels) + GAP
    length = _round_length(WHEEL / scale)
    page.curves([[(left, down + 8), (left + length * scale, down + 8)]], INK, 3, "solid")
    page.write(left, down + 16, f"{length:g} {unit}", 9, FAINT)


def _draw_legend(page: _Page, left: int, down: int, present: Sequence[int], labels: Mapping[int, str]) -> int:
    """Draw the legend and return its lower edge."""
    page.write(left, down, "outlines", 9, FAINT)
    for number, label in enumerate(present[:NAMED]):
        down += LEGEND
        ground, colour, dash = _style(number)
        page.curves([[(left, down + 7), (left + 44, down + 7)]], ground, 4, "solid")
        page.curves([[(left, down + 7), (left + 44, down + 7)]], colour, 1.8, dash)
        name = textwrap.shorten(labels.get(label, f"label {label}"), 24, placeholder="...")
        page.write(left + 54, down, name, 9, INK)
    if len(present) > NAMED:
        down += LEGEND
        page.write(left + 54, down, f"and {len(present) - NAMED} more", 9, FAINT)
    return down + LEGEND


def _round_length(longest: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not longer."""
    power = 10.0 ** np.floor(np.log10(longest))
    return float(max(step * power for step in (1, 2, 5) if step * power <= longest))
