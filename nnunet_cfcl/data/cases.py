"""Boxes of preprocessed cases, read through nnU-Net's own storage classes.

The pool's arrays carry a checksum of each of their chunks, which is looked at when a process first reads the chunk;
nnU-Net's own have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from numpy.typing import NDArray

from nnunet_cfcl.data.pool.manifest import remedy
from nnunet_cfcl.errors import UserError, foreign_errors_as, isolated
from nnunet_cfcl.files.chunk_checksums import check_chunks, check_header, damage, damage_named
from nnunet_cfcl.files.hashing import digest


@dataclass(frozen=True)
class StoredArray:
    """An array of a case in its file.

    Attributes:
        array: blosc2's, or NumPy's in nnU-Net's old format.
        file: it lies in.
        sound: numbers of the chunks that need not be looked at any more; grows.

    Raises:
        UserError: its header is not as it was written.
    """

    array: Any
    file: Path
    sound: set[int]

    def __post_init__(self) -> None:
        if isinstance(self.array, blosc2.NDArray):
            with damage_named(self.file, remedy(self.file)):
                check_header(self.array)

    def read(self, region: tuple[slice, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A box of it.

        Raises:
            UserError: it cannot be read, or is not as it was written; names the file and what makes it again.
        """
        with damage_named(self.file, remedy(self.file)):
            if isinstance(self.array, blosc2.NDArray):
                check_chunks(self.array, region, self.sound)
            return np.asarray(self.array[region], dtype=dtype)


def open_case(storage: Any, case: str, sound: dict[Path, set[int]]) -> list[StoredArray]:
    """Image and labels of a case, and its labels of the previous stage where the storage has a folder of them.

    Args:
        storage: one of nnU-Net's datasets.
        case: one of its identifiers.
        sound: file -> chunks that need not be looked at any more; grows.

    Raises:
        UserError: a file cannot be opened; names it and what makes it again.
    """
    blosc = isinstance(storage, nnUNetDatasetBlosc2)
    # the old format has both arrays in one archive
    names = (f"{case}.b2nd", f"{case}_seg.b2nd") if blosc else (f"{case}.npz",) * 2
    files = [Path(storage.source_folder, name) for name in names]
    if storage.folder_with_segs_from_previous_stage is not None:
        files.append(Path(storage.folder_with_segs_from_previous_stage, names[0]))
    def translate(error: Exception) -> UserError:
        file = _unreadable(files) or files[0].with_suffix(".pkl")
        return damage(file, remedy(file), error)

    with foreign_errors_as(translate):
        arrays = storage.load_case(case)
    return [StoredArray(array, file, sound.setdefault(file, set())) for array, file in zip(arrays, files)]


def _unreadable(files: Sequence[Path]) -> Path | None:
    """The first file that is none of blosc2."""
    for file in files:
        with isolated() as errors:
            blosc2.open(urlpath=str(file), mode="r")
        if errors:
            return file
    return None


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
        self._last: tuple[str, list[StoredArray]] | None = None
        self._sound: dict[Path, set[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def shape(self, case: str) -> tuple[int, ...]:
        """(C, Z, Y, X) of a case in voxels; reads no intensities."""
        return tuple(int(n) for n in self._arrays(case)[0].array.shape)

    def read(self, case: str, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Intensities (C, z, y, x), float32, of the spatial ``box`` (three slices inside the case).

        Raises:
            UserError: the file cannot be read, or is not as it was written; all other methods that open a case raise
                the same.
        """
        return self._arrays(case)[0].read((slice(None), *box), np.float32)

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Label map (z, y, x) of the spatial ``box`` as nnU-Net stores it, -1 outside of the image, and its confidence
        (z, y, x) in percent: 100 where there is a label."""
        labels: NDArray[np.int16] = self._arrays(case)[1].read((slice(0, 1), *box), np.int16)[0]
        return labels, certain(labels)

    def layout(self, case: str) -> tuple[Sequence[int] | None, Sequence[int] | None]:
        """Chunks and blocks of a case's own file; None where it is in nnU-Net's old format."""
        image = self._arrays(case)[0].array
        return getattr(image, "chunks", None), getattr(image, "blocks", None)

    @property
    def labelled(self) -> tuple[str, ...]:
        """The cases with labels: nnU-Net's training cases all have some."""
        return self.cases

    def content(self) -> str:
        """A digest of the cases' names and compressed sizes, which a copy on another machine keeps. Other images go
        unnoticed where all names and sizes are the same; reading all bytes would take minutes at every start."""
        return digest([[file.name, _compressed_size(file)] for file in self._files(".b2nd", ".npz")])

    def label_content(self) -> str:
        """The same for the labels, of their bytes: exchanging two labels leaves the size as it is."""
        return digest([[file.name, _checksum(file)] for file in self._files("_seg.b2nd", ".npz")])

    def _files(self, *endings: str) -> list[Path]:
        files = (Path(self._storage.source_folder) / f"{case}{end}" for case in self.cases for end in endings)
        return [file for file in files if file.exists()]

    def _arrays(self, case: str) -> list[StoredArray]:
        # one sample asks for a case's shape, some boxes and its labels: it is opened once for all of them
        last = self._last
        if last is None or last[0] != case:
            last = self._last = (case, open_case(self._storage, case, self._sound))
        return last[1]


def _compressed_size(file: Path) -> int:
    """In bytes; of blosc2's arrays without their metadata, whose size changes when a pool is made again: threads write
    a chunk's blocks in any order, and its checksum, which is kept there, is another one then."""
    if file.suffix == ".npz":
        return file.stat().st_size
    with damage_named(file, remedy(file)):
        return int(blosc2.open(urlpath=str(file), mode="r").schunk.cbytes)


def _checksum(file: Path) -> str:
    checksum = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


def certain(labels: NDArray[np.int16]) -> NDArray[np.int16]:
    """The confidence in percent of a label map (z, y, x) that is taken at its word."""
    return np.where(labels >= 0, 100, 0).astype(np.int16)
