"""Check of one case of the pool, or one silver label, before anything is preprocessed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray

from nnunet_cfcl.data.pool.dataset import PoolDataset
from nnunet_cfcl.data.pool.find_cases import RawCase, SilverSource
from nnunet_cfcl.errors import foreign_errors_as, isolated, with_fix

Read = TypeVar("Read")
# tolerance for rounded headers, as a fraction of a voxel (of 1 for directions)
TOLERANCE = 1e-2


class _Unreadable(Exception):
    """A reader cannot read a file; the message is the reader's."""


@dataclass(frozen=True)
class _Volume:
    """Array (C, *S) and geometry as returned by nnU-Net's reader."""

    array: NDArray[Any]
    properties: Mapping[str, Any]


@dataclass(frozen=True)
class CaseCheck:
    """Read all files of a case and list their problems; picklable.

    Args:
        dataset: dataset, plan and configuration.
    """

    dataset: PoolDataset

    def __call__(self, case: RawCase) -> list[str]:
        """List every problem: unreadable, not finite, wrong channels, grid, label values or probabilities."""
        return list(self._problems(case))

    def _problems(self, case: RawCase) -> Iterator[str]:
        image = None
        if case.images:
            try:
                image = self._read(lambda reader: reader.read_images([str(file) for file in case.images]))
                yield from self._image_problems(case, image)
            except _Unreadable as error:
                yield f"{_named(case.images)}: cannot be read ({error})"
        if case.silver is not None:
            yield from self._silver_problems(case.silver, image)

    def _read(self, read: Callable[[Any], tuple[NDArray[Any], dict[str, Any]]]) -> _Volume:
        return _Volume(*_quietly(lambda: read(self.dataset.plans.image_reader_writer_class())))

    def _image_problems(self, case: RawCase, image: _Volume) -> Iterator[str]:
        named, description = _named(case.images), self.dataset.dataset_json
        channels = description["channel_names"] if "channel_names" in description else description["modality"]
        if len(image.array) != len(channels):
            yield (f"{named}: has {len(image.array)} channels, expected {len(channels)} "
                   f"({', '.join(map(str, channels.values()))}){self._missing_channels(case, len(channels))}")
        if bad := np.count_nonzero(~np.isfinite(image.array)):
            yield f"{named}: {bad} voxels are not finite (NaN or infinite)"
        if case.training:
            yield from self._training_problems(case, image)

    def _missing_channels(self, case: RawCase, expected: int) -> str:
        ending = self.dataset.dataset_json["file_ending"]
        names = [f"{case.name}_{index:04d}{ending}" for index in range(len(case.images), expected)]
        return f"; {', '.join(names)} missing" if names else ""

    def _training_problems(self, case: RawCase, image: _Volume) -> Iterator[str]:
        """The preprocessed silver label of a training case must lie on the grid of the preprocessed image."""
        folder, named = str(self.dataset.preprocessed), _named(case.images)
        # missing folder, foreign files, missing or broken case: the same command corrects all of them
        with isolated() as errors:
            storage = infer_dataset_class(folder)
            properties = storage(folder, [case.name]).load_case(case.name)[3]
        if errors:
            yield with_fix(f"{named}: there is no preprocessed training case {case.name} in {folder}",
                           f"run {self.dataset.preprocess_command}")
            return
        found, expected = self.dataset.transposed(image.array).shape[1:], tuple(properties["shape_before_cropping"])
        if found != expected:
            yield with_fix(f"{named}: has shape {found} (axes of the plan), but had {expected} when it was "
                           "preprocessed", f"run {self.dataset.preprocess_command}")

    def _silver_problems(self, silver: SilverSource, image: _Volume | None) -> Iterator[str]:
        try:
            label = self._read(lambda reader: reader.read_seg(str(silver.label)))
        except _Unreadable as error:
            yield f"{silver.label}: cannot be read ({error})"
            return
        if len(label.array) != 1:
            yield f"{silver.label}: has {len(label.array)} channels, expected 1 (a label map)"
            return
        if image is not None:
            yield from (f"{silver.label}: {problem}" for problem in geometry_problems(label, image))
        if unknown := self._unknown_values(label.array):
            yield (f"{silver.label}: has the values {_listed(unknown)}, which are not in dataset.json (known: "
                   f"{_listed(self._known_values())})")
        if silver.probabilities is not None:
            yield from self._probability_problems(silver.probabilities, label.array.shape[1:])

    def _known_values(self) -> list[int]:
        manager = self.dataset.plans.get_label_manager(self.dataset.dataset_json)
        ignore = [manager.ignore_label] if manager.has_ignore_label else []
        return [*(int(value) for value in manager.all_labels), *ignore]

    def _unknown_values(self, labels: NDArray[Any]) -> list[float]:
        return [float(value) for value in np.unique(labels) if value not in self._known_values()]

    def _probability_problems(self, file: Path, shape: Sequence[int]) -> Iterator[str]:
        manager = self.dataset.plans.get_label_manager(self.dataset.dataset_json)
        expected = (manager.num_segmentation_heads, *shape)
        try:
            probabilities = _quietly(lambda: read_probabilities(file))
        except _Unreadable as error:
            yield f"{file}: cannot be read ({error})"
            return
        if probabilities is None:
            yield f"{file}: has no array 'probabilities', which nnUNetv2_predict --save_probabilities writes"
        elif probabilities.shape != expected:
            yield (f"{file}: probabilities of shape {probabilities.shape}, expected {expected} (one map per label or "
                   "region)")
        # NaN fails the comparison too
        elif not (probabilities.min() >= -TOLERANCE and probabilities.max() <= 1 + TOLERANCE):
            yield f"{file}: probabilities from {probabilities.min():g} to {probabilities.max():g}, expected 0 to 1"


def read_probabilities(file: Path) -> NDArray[Any] | None:
    """Read the array ``probabilities`` (H, *S) that nnU-Net saved, in its reader's axis order; None if missing."""
    with np.load(file) as content:
        return content.get("probabilities")


def geometry_problems(label: _Volume, image: _Volume) -> Iterator[str]:
    """Differences between the grids of a label map and its image: shape, spacing, position in space."""
    if label.array.shape[1:] != image.array.shape[1:]:
        yield f"has shape {label.array.shape[1:]}, expected {image.array.shape[1:]} as its image"
    spacing = np.asarray(image.properties["spacing"], dtype=float)
    found = np.asarray(label.properties["spacing"], dtype=float)
    if not np.allclose(found, spacing, rtol=TOLERANCE, atol=0):
        yield f"has spacing {_listed(found)}, expected {_listed(spacing)} as its image"
        return
    here, there = _position(label.properties), _position(image.properties)
    for part in here.keys() & there.keys():
        # a direction has no unit, an origin (and an affine's last column) is in millimetres
        unit = 1.0 if part == "direction" else float(spacing.min())
        if not np.allclose(here[part], there[part], rtol=0, atol=TOLERANCE * unit):
            yield f"has {part} {_listed(np.ravel(here[part]))}, expected {_listed(np.ravel(there[part]))} as its image"


def _position(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Position in space as returned by nnU-Net's reader; empty for natural images."""
    if itk := properties.get("sitk_stuff"):
        return {"origin": itk["origin"], "direction": itk["direction"]}
    if nib := properties.get("nibabel_stuff"):
        # a reader that reorients images reorients labels too
        return {"affine": nib.get("reoriented_affine", nib["original_affine"])}
    return {}


def _quietly(read: Callable[[], Read]) -> Read:
    """Call ``read``; nnU-Net's readers print their problems, which become the message of the exception."""
    printed = io.StringIO()

    def translate(error: Exception) -> _Unreadable:
        lines = [line for line in (*str(error).splitlines()[-1:], *printed.getvalue().splitlines()[:1]) if line.strip()]
        return _Unreadable(lines[0] if lines else type(error).__name__)

    with foreign_errors_as(translate), contextlib.redirect_stdout(printed):
        return read()


def _named(images: Sequence[Path]) -> str:
    return f"{images[0]}" + (f" to {images[-1].name}" if len(images) > 1 else "")


def _listed(values: Any, at_most: int = 12) -> str:
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts[:at_most]) + (", ..." if len(texts) > at_most else "")
