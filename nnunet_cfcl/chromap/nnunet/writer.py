"""Writer of the CHRO-maps of predicted cases, in a thread beside nnU-Net's own export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.montage import write_montage
from nnunet_cfcl.chromap.nifti import read_rgb_volume, write_embedding, write_rgb_volume
from nnunet_cfcl.chromap.nnunet.case import has_orientation, in_file_order, input_geometry, is_picture, to_input_voxels
from nnunet_cfcl.chromap.palettes import color_wheel
from nnunet_cfcl.chromap.picture import grey, grey_background, overlay, write_png
from nnunet_cfcl.chromap.seams import seam_contrast
from nnunet_cfcl.config import ChromapSettings
from nnunet_cfcl.errors import isolated, reason
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.json_files import read_json

FOLDER, EMBEDDING = "chromap", "_embedding.nii.gz"


@dataclass(frozen=True)
class MappedCase:
    """A case whose plane coordinates are known.

    Attributes:
        name: name of the case.
        coordinates: (2, *preprocessed shape), half precision, on the CPU.
        borders: borders of the windows, see `seam_contrast`.
        properties: properties of nnU-Net's preprocessing.
        files: files of the input, channel by channel.
        mask: file of the mask that nnU-Net writes; None: it writes no mask.
    """

    name: str
    coordinates: Tensor
    borders: Sequence[Sequence[int]]
    properties: Mapping[str, Any]
    files: Sequence[str]
    mask: Path | None


class ChromapWriter:
    """Writes maps in a thread, one case at a time; `finish` draws the montages, which need the masks.

    Args:
        folder: ``OUT/chromap``.
        space: colour space of the maps.
        settings: settings of the maps.
        plans, configuration: plan and configuration of the model.
        labels: number of a label -> its name.
        failures: case -> reason why it has no map; grows.
        part: suffix of the summary, where several processes share the folder.
    """

    def __init__(
        self, folder: Path, space: ColorSpace, settings: ChromapSettings, plans: PlansManager,
        configuration: ConfigurationManager, labels: Mapping[int, str], failures: dict[str, str], part: str = "",
    ) -> None:
        self.folder, self._space, self._settings, self._labels = folder, space, settings, dict(labels)
        self._plans, self._configuration = plans, configuration
        self._summary_file = folder / f"summary{part}.json"
        self._thread = ThreadPoolExecutor(1, "chromap")
        self._pending: tuple[str, Future[float | None]] | None = None
        self._volumes: list[MappedCase] = []
        self.failures = failures
        self._seams: dict[str, float | None] = {}

    @property
    def made(self) -> dict[str, float | None]:
        """Contrast at the borders of the windows, of every case whose map was written."""
        return {name: contrast for name, contrast in self._seams.items() if name not in self.failures}

    def submit(self, case: MappedCase) -> None:
        """Write a map after the previous one is finished: at most two cases are held in memory."""
        self._collect()
        self._pending = case.name, self._thread.submit(self._write, case)

    def finish(self) -> None:
        """Wait for all maps, draw the montages of volumes with the masks, which exist now, and write the summary."""
        self._collect()
        self._thread.shutdown()
        for case in self._volumes:
            with self._isolated(case.name):
                self._draw_montage(case)
        self._write_summary()

    def _collect(self) -> None:
        if self._pending is not None:
            name, future = self._pending
            self._pending = None
            with self._isolated(name):
                self._seams[name] = future.result()
                # now: after a kill the files are not drawn again, and only the summary records them
                self._write_summary()

    @contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        """Context in which a case may fail; the others get their maps."""
        with isolated() as errors:
            yield
        for error in errors:
            self.failures.setdefault(name, reason(error))

    def _write(self, case: MappedCase) -> float | None:
        contrast = seam_contrast(case.coordinates, case.borders)
        coordinates, inside = to_input_voxels(case.coordinates, case.properties, self._plans, self._configuration)
        image = self._image(case)
        colors = self._colors(coordinates, inside, image)
        if self._settings.embedding:
            self._write_embedding(case, coordinates, inside)
        if is_picture(case.properties, inside.shape):
            drawn = overlay(grey(image[0]), colors[0], self._settings.alpha, inside[0])
            write_png(self.folder / f"{case.name}.png", drawn)
        else:
            turned, geometry = in_file_order(colors, input_geometry(case.properties), case.properties)
            write_rgb_volume(self.folder / f"{case.name}.nii.gz", turned, geometry)
            # coordinates are large and not needed any more, and a view of them would keep them all
            self._volumes.append(replace(case, coordinates=torch.empty(0)))
        return contrast

    def _write_embedding(self, case: MappedCase, coordinates: Tensor, inside: NDArray[np.bool_]) -> None:
        plane = np.where(inside, coordinates.float().numpy(), np.nan)
        turned, geometry = in_file_order(
            plane.transpose(1, 2, 3, 0), input_geometry(case.properties), case.properties)
        write_embedding(self.folder / f"{case.name}{EMBEDDING}", turned.transpose(3, 0, 1, 2), geometry)

    def _colors(
        self, coordinates: Tensor, inside: NDArray[np.bool_], image: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Colours (Z, Y, X, 3), black outside; slice by slice, to save memory."""
        colors = np.zeros((*inside.shape, 3), np.uint8)
        for z in range(len(colors)):
            colors[z] = self._space.color(coordinates[:, z].float()).numpy()
        if self._settings.grey_background:
            colors = grey_background(colors, image)
        colors[~inside] = 0
        return colors

    def _image(self, case: MappedCase) -> NDArray[np.float32]:
        """Read the first channel (Z, Y, X) of the input."""
        images, _ = self._plans.image_reader_writer_class().read_images(list(case.files))
        return np.asarray(images[0], np.float32)

    def _draw_montage(self, case: MappedCase) -> None:
        reader = self._plans.image_reader_writer_class()
        image = self._image(case)
        # the map's voxels are in the file's order, the reader's may not be
        colors = read_rgb_volume(self.folder / f"{case.name}.nii.gz")
        image, geometry = in_file_order(image, input_geometry(case.properties), case.properties)
        mask = None
        if case.mask is not None and case.mask.is_file():
            labels = np.asarray(reader.read_seg(str(case.mask))[0][0])
            mask = in_file_order(labels, input_geometry(case.properties), case.properties)[0].astype(np.int16)
        spacing = [float(one) for one in np.linalg.norm(geometry.affine[:3, :3], axis=0)[::-1]]
        # the rest of the volume was cropped away and is black
        write_montage(
            self.folder / f"{case.name}.png", image, colors, np.any(colors, axis=-1), mask, spacing,
            color_wheel(256, self._space.palette).numpy(), case.name, self._settings.alpha,
            geometry=geometry if has_orientation(case.properties) else None, labels=self._labels)

    def _write_summary(self) -> None:
        """Write the cases with their colour space; those that this run left alone are kept from earlier runs."""
        cases = {**self._earlier_cases(), **{name: {"weights": self._space.identity, "seam_contrast": contrast}
                                             for name, contrast in self.made.items()}}
        content = {
            "color_space": {"weights": self._space.identity, "reducer": self._space.reducer,
                            "palette": self._space.palette},
            "cases": {name: cases[name] for name in sorted(cases) if name not in self.failures},
            "failures": self.failures}
        write_text_atomically(self._summary_file, json.dumps(content, indent=1))

    def _earlier_cases(self) -> dict[str, Any]:
        try:
            cases = read_json(self._summary_file)["cases"]
            return dict(cases)
        # missing or damaged: there is nothing to keep
        except (OSError, ValueError, KeyError, TypeError):
            return {}
