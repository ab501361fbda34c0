"""Unusual images in the pretraining: a table of inputs, tried with every kind of method in the real loop.

    python -m tests.pretraining.unusual_inputs

prints it in Markdown, for the documentation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining import data, loop
from nnunet_cfcl.views import ViewGeometry
from tests.conftest import CasesInMemory
from tests.pretraining.every_method import DIFFERENT, labelled, make_task, pretraining_of

Image = NDArray[Any]
FLAT, VOLUME = (1, 1, 40, 44), (1, 16, 24, 22)
#: Patches of volumes are small here, and so would be the smallest views.
LARGE_VIEWS = {"views": {"crop_fraction": (0.3, 1.0)}}


def smooth(number: int, shape: tuple[int, ...] = FLAT) -> Image:
    """A z-scored smooth random image (C, Z, Y, X); a single voxel keeps its value."""
    image = np.random.default_rng(number).normal(size=shape).cumsum(-1).cumsum(-2)
    return (image - image.mean()) / image.std() if image.size > 1 else image


def bright(image: Image) -> Image:
    """Two labels (Z, Y, X): below and above the mean of the first channel."""
    return (image[0] > image[0].mean()).astype(np.int16)


@dataclass(frozen=True)
class UnusualInput:
    """One row of the table.

    Attributes:
        name: for the table.
        image: number of a case -> its intensities (C, Z, Y, X).
        labels: image -> label map (Z, Y, X).
        geometry: patch and spacing; None: those of `every_method`.
        scheme: nnU-Net's normalisation of the images.
        settings: changed from `every_method.SHORT`.
        views: takes the place of the drawn views.
        refused: what is said where the training stops.
        skips: methods that skip steps, as their loss overflows.
    """

    name: str
    image: Callable[[int], Image] = smooth
    labels: Callable[[Image], Image] = bright
    geometry: ViewGeometry | None = None
    scheme: str = "ZScoreNormalization"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    views: Callable[..., Tensor] | None = None
    refused: str | None = None
    skips: tuple[str, ...] = ()

    def reader(self) -> CasesInMemory:
        """Three cases, one of them without labels."""
        return labelled({f"case_{n}": self.image(n) for n in range(3)}, self.labels, without=("case_2",))


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        refusal: the message of a `UserError`; None: the run ended as it should.
        losses: of the epochs.
        skipped: share of the steps without finite gradients.
        finite: whether all weights are.
        trained: whether any weight has changed.
    """

    refusal: str | None
    losses: tuple[float, ...]
    skipped: float
    finite: bool
    trained: bool


def with_voxel(value: float, case: int = 1) -> Callable[[int], Image]:
    """Images of which one has a single odd voxel, in the middle, so that every crop holds it."""

    def image(number: int) -> Image:
        found = smooth(number)
        found[0, 0, 20, 22] = value if number == case else found[0, 0, 20, 22]
        return found

    return image


def apart(generator: torch.Generator, geometry: ViewGeometry, settings: Any, n_views: int) -> Tensor:
    """Views of which no two share a point: strips beside each other along the last axis."""
    half = torch.tensor(geometry.extent) / 2
    views = torch.cat([half.diag(), torch.zeros(len(half), 1)], dim=1).repeat(n_views, 1, 1)
    views[:, -1, -2] /= n_views
    views[:, -1, -1] = half[-1] * ((2 * torch.arange(n_views) + 1) / n_views - 1)
    return views


def several_channels(count: int, constant: bool = False) -> Callable[[int], Image]:
    """Images of several channels, the last of them without any contrast if ``constant``."""

    def image(number: int) -> Image:
        found = smooth(number, (count, 1, 40, 44))
        found[-1] = 0.5 if constant else found[-1]
        return found

    return image


def sized(*shapes: tuple[int, ...]) -> Callable[[int], Image]:
    """Images of different shapes in turns."""
    return lambda number: smooth(number, shapes[number % len(shapes)])


def volume(number: int) -> Image:
    """A smooth random image of three dimensions."""
    return smooth(number, VOLUME)


def as_bytes(number: int) -> Image:
    """An 8-bit image, 0 to 255."""
    image = smooth(number)
    return np.round(255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)


def spaced(*spacing: float) -> ViewGeometry:
    """A patch of voxels of this size in millimetres."""
    return ViewGeometry((24, 28) if len(spacing) == 2 else (8, 14, 16), spacing)


NOT_FINITE = r"case 'case_1' holds values that are not finite .* doctor .*--data"
INPUTS = (
    UnusualInput("one NaN voxel", with_voxel(np.nan), refused=NOT_FINITE),
    UnusualInput("one infinite voxel", with_voxel(-np.inf), refused=NOT_FINITE),
    UnusualInput("one voxel of 1e30", with_voxel(1e30), skips=("MAE",)),
    UnusualInput("all voxels 0", lambda number: np.zeros(FLAT)),
    UnusualInput("all voxels 7.5", lambda number: np.full(FLAT, 7.5), scheme="NoNormalization"),
    UnusualInput("one constant image among others", lambda number: smooth(number) * (number != 1)),
    UnusualInput("background alone", labels=lambda image: np.zeros(image.shape[1:])),
    UnusualInput("nothing labelled", labels=lambda image: np.full(image.shape[1:], -1)),
    UnusualInput("views that share no point", views=apart),
    UnusualInput("cases smaller than the patch", sized((1, 1, 10, 9), (1, 1, 60, 7))),
    UnusualInput("volumes smaller than the patch", sized((1, 3, 10, 9), (1, 1, 30, 30), (1, 30, 5, 6)),
                 geometry=spaced(1.0, 1.0, 1.0), settings=LARGE_VIEWS),
    UnusualInput("cases of a single voxel", sized((1, 1, 1, 1))),
    UnusualInput("four channels", several_channels(4)),
    UnusualInput("four channels, one of them constant", several_channels(4, constant=True)),
    UnusualInput("8-bit integers, not normalised", as_bytes, scheme="NoNormalization"),
    UnusualInput("8-bit integers in [0, 1]", lambda number: as_bytes(number) / 255, scheme="RGBTo01Normalization"),
    UnusualInput("half precision", lambda number: smooth(number).astype(np.float16)),
    UnusualInput("double precision, up to 1e6", lambda number: 1e6 * smooth(number), scheme="NoNormalization"),
    UnusualInput("spacing 1 x 10 mm", geometry=spaced(1.0, 10.0)),
    UnusualInput("spacing 10 x 1 mm", geometry=spaced(10.0, 1.0)),
    UnusualInput("slices of 10 mm", volume, geometry=spaced(10.0, 1.0, 1.0), settings=LARGE_VIEWS),
    UnusualInput("slices along the last axis", volume, geometry=spaced(1.0, 1.0, 10.0), settings=LARGE_VIEWS),
    UnusualInput("rows of 1 x 10 x 10 mm", volume, geometry=spaced(1.0, 10.0, 10.0), settings=LARGE_VIEWS),
)


def try_input(unusual: UnusualInput, method: str, folder: Path) -> Outcome:
    """Pretrain for two steps."""
    task = make_task(method, folder, unusual.reader(), geometry=unusual.geometry, settings=unusual.settings,
                     scheme=unusual.scheme, log=lambda line: None)
    lines: list[Mapping[str, float]] = []
    # pictures take longer than the training
    with patch.object(loop, "plot_progress", lambda epochs, file: file.touch()), \
            patch.object(loop, "plot_views", lambda *arguments: None), \
            patch.object(data, "draw_affine_views", unusual.views or data.draw_affine_views):
        pretraining = pretraining_of(task)
        before = [parameter.detach().clone() for parameter in pretraining.parameters]
        refusal = None
        try:
            pretraining.run(resume=False)
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        except UserError as error:
            refusal = str(error)
    weights = pretraining.model.state_dict().values()
    changed = any(not torch.equal(a, b) for a, b in zip(before, pretraining.parameters, strict=True))
    return Outcome(refusal, tuple(line["loss"] for line in lines), max((line["skipped"] for line in lines), default=0),
                   all(bool(value.isfinite().all()) for value in weights), changed)


def table() -> str:
    """Markdown, one row per input, each tried with every method."""
    rows = []
    for unusual in INPUTS:
        told: dict[str, list[str]] = {}
        for method in DIFFERENT:
            with tempfile.TemporaryDirectory() as folder:
                told.setdefault(in_words(try_input(unusual, method, Path(folder))), []).append(method)
        whole = len(told) == 1
        what = "; ".join(words if whole else f"{words} ({', '.join(names)})" for words, names in told.items())
        rows.append(f"| {unusual.name} | {what} |")
    return "\n".join(["| input | what happened |", "|---|---|", *rows, "", f"Methods: {', '.join(DIFFERENT)}."])


def in_words(outcome: Outcome) -> str:
    """For the table."""
    if outcome.refusal:
        return f"refused: {outcome.refusal.partition(' in voxels')[0]}"
    if outcome.skipped:
        return f"{outcome.skipped:.0%} of the steps skipped"
    return "trains, all numbers finite" if outcome.trained else "runs, nothing to learn, all numbers finite"


if __name__ == "__main__":
    print(table())
