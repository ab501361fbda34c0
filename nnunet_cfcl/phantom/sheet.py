"""Contact sheet of phantom cases: one row per patient, the factual image and each true counterfactual."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phantom.anatomy import LABELS
from nnunet_cfcl.phantom.dataset import Case
from nnunet_cfcl.phantom.scm import INTERVENTIONS, counterfactual, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_COLOURS: dict[str, str] = {"lung": "#4cc9f0", "heart": "#f72585", "spine": "#ffd166"}
PANEL_INCHES = 1.9


def _slice(volume: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return a 2D image unchanged, and the middle axial slice of a volume."""
    return volume if volume.ndim == 2 else volume[volume.shape[0] // 2]


def _draw_panel(axes: Axes, image: NDArray[np.generic], title: str, mask: NDArray[np.generic] | None = None) -> None:
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title, fontsize=8, color="white", pad=3)
    axes.axis("off")
    if mask is None:
        return
    for name, colour in LABEL_COLOURS.items():
        organ = mask == LABELS[name]
        if organ.any():
            axes.contour(organ, levels=[0.5], colors=[colour], linewidths=1.1)


def contact_sheet(path: str | Path, cases: Sequence[Case], dpi: int = 110) -> Path:
    """Draw an overview of cases; volumes show their middle axial slice.

    Columns: factual image, one true counterfactual per intervention, factual image with the contours of the mask.

    Args:
        path: Picture file to write; the ending chooses the format.
        cases: At least one case, one row each.
        dpi: Resolution of the picture.

    Returns:
        The picture's path.

    Raises:
        UserError: If there is no case.
    """
    from matplotlib.figure import Figure

    if not cases:
        raise UserError("a contact sheet needs at least one case, found none")
    columns = len(INTERVENTIONS) + 2
    size = (PANEL_INCHES * columns, (PANEL_INCHES + 0.2) * len(cases))
    figure = Figure(figsize=size, facecolor="#14161a", layout="constrained")
    grid = figure.subplots(len(cases), columns, squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        taken = case.attributes
        factual = render(case.patient, taken.scanner, taken.disease)
        image = _slice(factual.image)
        _draw_panel(row[0], image, f"{case.name}\nscanner {taken.scanner}, {taken.disease}")
        for axes, intervention in zip(row[1:], INTERVENTIONS, strict=False):
            changed = counterfactual(case.patient, taken, intervention).image
            _draw_panel(axes, _slice(changed), f"{intervention.replace('_', ' + ')} changed")
        _draw_panel(row[-1], image, "true mask", _slice(factual.mask))
    figure.savefig(path, dpi=dpi)
    return Path(path)
