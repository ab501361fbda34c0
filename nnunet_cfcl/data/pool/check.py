"""Checks one case of the pool, or one silver label, before anything is preprocessed."""

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
from nnunet_cfcl.data.pool.sources import RawCase, SilverSource
from nnunet_cfcl.errors import foreign_errors_as, isolated

Read = TypeVar("Read")
# share of a voxel (of 1 for directions) that writing and reading a header may round away
TOLERANCE = 1e-2


class _Unreadable(Exception):
    """A file that its reader refuses; the message is the reader's last word."""


@dataclass(frozen=True)
class _Volume:
    """(C, *S) as nnU-Net's reader gives it, with what it says of the geometry."""

    array: NDArray[Any]
    properties: Mapping[str, Any]


@dataclass(frozen=True)
class CaseCheck:
    """Reads all files of a case and lists what is wrong with them; picklable.

    Args:
        dataset: the dataset, its plan and configuration.
    """

    dataset: PoolDataset

    def __call__(self, case: RawCase) -> list[str]:
        """One line for every fault: unreadable, not finite, wrong channels, grid, label values or probabilities."""
        return list(self._faults(case))

    def _faults(self, case: RawCase) -> Iterator[str]:
        image = None
        if case.images:
            try:
                image = self._read(lambda reader: reader.read_images([str(file) for file in case.images]))
                yield from self._image_faults(case, image)
            except _Unreadable as error:
                yield f"{_named(case.images)}: cannot be read ({error})"
        if case.silver is not None:
            yield from self._silver_faults(case.silver, image)

    def _read(self, read: Callable[[Any], tuple[NDArray[Any], dict[str, Any]]]) -> _Volume:
        return _Volume(*_quietly(lambda: read(self.dataset.plans.image_reader_writer_class())))

    def _image_faults(self, case: RawCase, image: _Volume) -> Iterator[str]:
        named, description = _named(case.images), self.dataset.dataset_json
        channels = description["channel_names"] if "channel_names" in description else description["modality"]
        if len(image.array) != len(channels):
            yield (f"{named}: has {len(image.array)} channels, expected {len(channels)} "
                   f"({', '.join(map(str, channels.values()))}){self._missing_channels(case, len(channels))}")
        if bad := np.count_nonzero(~np.isfinite(image.array)):
            yield f"{named}: {bad} voxels are not finite (NaN or infinite)"
        if case.training:
            yield from self._training_faults(case, image)

    def _missing_channels(self, case: RawCase, expected: int) -> str:
        ending = self.dataset.dataset_json["file_ending"]
        names = [f"{case.name}_{index:04d}{ending}" for index in range(len(case.images), expected)]
        return f"; {', '.join(names)} missing" if names else ""

    def _training_faults(self, case: RawCase, image: _Volume) -> Iterator[str]:
        """The silver label of a training case must come to lie on the grid of what is preprocessed already."""
        folder, named = str(self.dataset.preprocessed), _named(case.images)
        # missing folder, foreign files, missing or broken case: the same command corrects all of them
        with isolated() as errors:
            storage = infer_dataset_class(folder)
            properties = storage(folder, [case.name]).load_case(case.name)[3]
        if errors:
            yield (f"{named}: there is no preprocessed training case {case.name} in {folder}; run "
                   f"{self.dataset.preprocess_command}")
            return
        found, expected = self.dataset.transposed(image.array).shape[1:], tuple(properties["shape_before_cropping"])
        if found != expected:
            yield (f"{named}: has shape {found} (axes of the plan), but had {expected} when it was preprocessed; run "
                   f"{self.dataset.preprocess_command}")

    def _silver_faults(self, silver: SilverSource, image: _Volume | None) -> Iterator[str]:
        try:
            label = self._read(lambda reader: reader.read_seg(str(silver.label)))
        except _Unreadable as error:
            yield f"{silver.label}: cannot be read ({error})"
            return
        if len(label.array) != 1:
            yield f"{silver.label}: has {len(label.array)} channels, a label map has one"
            return
        if image is not None:
            yield from (f"{silver.label}: {fault}" for fault in geometry_faults(label, image))
        if unknown := self._unknown_values(label.array):
            yield (f"{silver.label}: has the values {_listed(unknown)}, which are not in dataset.json (known: "
                   f"{_listed(self._known_values())})")
        if silver.probabilities is not None:
            yield from self._probability_faults(silver.probabilities, label.array.shape[1:])

    def _known_values(self) -> list[int]:
        manager = self.dataset.plans.get_label_manager(self.dataset.dataset_json)
        ignore = [manager.ignore_label] if manager.has_ignore_label else []
        return [*(int(value) for value in manager.all_labels), *ignore]

    def _unknown_values(self, labels: NDArray[Any]) -> list[float]:
        return [float(value) for value in np.unique(labels) if value not in self._known_values()]

    def _probability_faults(self, file: Path, shape: Sequence[int]) -> Iterator[str]:
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
    """The array ``probabilities`` (H, *S) of nnU-Net's saved probabilities, axes as its reader gives them; or None."""
    with np.load(file) as content:
        return content.get("probabilities")


def geometry_faults(label: _Volume, image: _Volume) -> Iterator[str]:
    """In what the grid of a label differs from that of its image: shape, spacing, position in space."""
    if label.array.shape[1:] != image.array.shape[1:]:
        yield f"has shape {label.array.shape[1:]}, its image has {image.array.shape[1:]}"
    spacing = np.asarray(image.properties["spacing"], dtype=float)
    found = np.asarray(label.properties["spacing"], dtype=float)
    if not np.allclose(found, spacing, rtol=TOLERANCE, atol=0):
        yield f"has spacing {_listed(found)}, its image has {_listed(spacing)}"
        return
    here, there = _position(label.properties), _position(image.properties)
    for part in here.keys() & there.keys():
        # a direction has no unit, an origin (and an affine's last column) is in millimetres
        unit = 1.0 if part == "direction" else float(spacing.min())
        if not np.allclose(here[part], there[part], rtol=0, atol=TOLERANCE * unit):
            yield f"has {part} {_listed(np.ravel(here[part]))}, its image has {_listed(np.ravel(there[part]))}"


def _position(properties: Mapping[str, Any]) -> dict[str, Any]:
    """What nnU-Net's reader says of the position in space; readers of plain pictures say nothing."""
    if itk := properties.get("sitk_stuff"):
        return {"origin": itk["origin"], "direction": itk["direction"]}
    if nib := properties.get("nibabel_stuff"):
        # a reader that turns all images into one orientation turns labels too
        return {"affine": nib.get("reoriented_affine", nib["original_affine"])}
    return {}


def _quietly(read: Callable[[], Read]) -> Read:
    """What ``read`` returns; nnU-Net's readers print what is wrong, which becomes the error's message."""
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
