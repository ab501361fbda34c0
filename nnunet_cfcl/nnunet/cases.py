"""Boxes of preprocessed cases, read through nnU-Net's own storage classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray

from nnunet_cfcl.config import digest


class PreprocessedCases:
    """Reads boxes of cases from a folder with nnU-Net's preprocessed data; picklable, safe in workers.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX/<data_identifier>``.
        cases: the identifiers to use, in any order.

    Attributes:
        cases: the identifiers to use, sorted.
        known: all identifiers in the folder, sorted.
    """

    def __init__(self, folder: str, cases: Sequence[str]) -> None:
        self.cases = tuple(sorted(cases))
        storage = infer_dataset_class(folder)
        self.known = tuple(sorted(storage.get_identifiers(folder)))
        self._storage = storage(folder, list(self.cases))
        self._last: tuple[str, Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def shape(self, case: str) -> tuple[int, ...]:
        """(C, Z, Y, X) of a case in voxels; reads no intensities."""
        return tuple(int(n) for n in self._arrays(case)[0].shape)

    def read(self, case: str, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Intensities (C, z, y, x), float32, of the spatial ``box`` (three slices inside the case)."""
        return np.asarray(self._arrays(case)[0][(slice(None), *box)], dtype=np.float32)

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Label map (z, y, x) of the spatial ``box`` as nnU-Net stores it, -1 outside of the image, and its confidence
        (z, y, x) in percent: 100 where there is a label."""
        labels = np.asarray(self._arrays(case)[1][(slice(0, 1), *box)][0], dtype=np.int16)
        return labels, certain(labels)

    def layout(self, case: str) -> tuple[Sequence[int] | None, Sequence[int] | None]:
        """Chunks and blocks of a case's own file; None where it is in nnU-Net's old format."""
        image = self._arrays(case)[0]
        return getattr(image, "chunks", None), getattr(image, "blocks", None)

    @property
    def labelled(self) -> tuple[str, ...]:
        """The cases with labels: nnU-Net's training cases all have some."""
        return self.cases

    def content(self) -> str:
        """A digest of the cases' names and compressed sizes, which a copy on another machine keeps. Other images go
        unnoticed where all names and sizes are the same; reading all bytes would take minutes at every start."""
        return digest([[file.name, file.stat().st_size] for file in self._files(".b2nd", ".npz")])

    def label_content(self) -> str:
        """The same for the labels, of their bytes: exchanging two labels leaves the size as it is."""
        return digest([[file.name, _checksum(file)] for file in self._files("_seg.b2nd", ".npz")])

    def _files(self, *endings: str) -> list[Path]:
        files = (Path(self._storage.source_folder) / f"{case}{end}" for case in self.cases for end in endings)
        return [file for file in files if file.exists()]

    def _arrays(self, case: str) -> tuple[Any, Any]:
        # one sample asks for a case's shape, some boxes and its labels: it is opened once for all of them
        last = self._last
        if last is None or last[0] != case:
            last = self._last = (case, *self._storage.load_case(case)[:2])
        return last[1:]


def _checksum(file: Path) -> str:
    checksum = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


def certain(labels: NDArray[np.int16]) -> NDArray[np.int16]:
    """The confidence in percent of a label map (z, y, x) that is taken at its word."""
    return np.where(labels >= 0, 100, 0).astype(np.int16)
