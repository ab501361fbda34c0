"""Reader of boxes of preprocessed cases, through nnU-Net's own storage classes.

The pool's arrays carry a checksum of every chunk, which is verified when a process first reads the chunk; nnU-Net's own
arrays have none.
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

from nnunet_cfcl.data.pool.manifest import recreate_command
from nnunet_cfcl.errors import UserError, foreign_errors_as, isolated
from nnunet_cfcl.files.chunk_checksums import check_chunks, check_header, damage, damage_named
from nnunet_cfcl.files.hashing import digest


@dataclass(frozen=True)
class StoredArray:
    """One array of a case and its file.

    Attributes:
        array: blosc2 array, or NumPy array in nnU-Net's old format.
        file: file that holds the array.
        verified: numbers of the chunks that have been verified; grows.

    Raises:
        UserError: the header differs from the one that was written.
    """

    array: Any
    file: Path
    verified: set[int]

    def __post_init__(self) -> None:
        if isinstance(self.array, blosc2.NDArray):
            with damage_named(self.file, recreate_command(self.file)):
                check_header(self.array)

    def read(self, region: tuple[slice, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Read a box of the array.

        Args:
            region: one slice per axis.
            dtype: data type to return.

        Raises:
            UserError: the file cannot be read or is damaged; the fix says how to recreate it.
        """
        with damage_named(self.file, recreate_command(self.file)):
            if isinstance(self.array, blosc2.NDArray):
                check_chunks(self.array, region, self.verified)
            return np.asarray(self.array[region], dtype=dtype)


def open_case(storage: Any, case: str, verified: dict[Path, set[int]]) -> list[StoredArray]:
    """Open image and labels of a case, and its labels of the previous stage where the storage has them.

    Args:
        storage: nnU-Net dataset object.
        case: case identifier.
        verified: file -> numbers of the chunks that have been verified; grows.

    Raises:
        UserError: a file cannot be opened; the fix says how to recreate it.
    """
    blosc = isinstance(storage, nnUNetDatasetBlosc2)
    # nnU-Net's old format keeps both arrays in one archive
    names = (f"{case}.b2nd", f"{case}_seg.b2nd") if blosc else (f"{case}.npz",) * 2
    files = [Path(storage.source_folder, name) for name in names]
    if storage.folder_with_segs_from_previous_stage is not None:
        files.append(Path(storage.folder_with_segs_from_previous_stage, names[0]))

    def translate(error: Exception) -> UserError:
        file = _unreadable(files) or files[0].with_suffix(".pkl")
        return damage(file, recreate_command(file), error)

    with foreign_errors_as(translate):
        arrays = storage.load_case(case)
    return [StoredArray(array, file, verified.setdefault(file, set())) for array, file in zip(arrays, files)]


def _unreadable(files: Sequence[Path]) -> Path | None:
    """The first file that blosc2 cannot open."""
    for file in files:
        with isolated() as errors:
            blosc2.open(urlpath=str(file), mode="r")
        if errors:
            return file
    return None


class PreprocessedCases:
    """Reader of boxes of nnU-Net's preprocessed cases; picklable, safe in worker processes.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX/<data_identifier>``.
        cases: case identifiers to use, in any order.

    Attributes:
        cases: case identifiers to use, sorted.
        known: all case identifiers in the folder, sorted.
    """

    def __init__(self, folder: str, cases: Sequence[str]) -> None:
        self.cases = tuple(sorted(cases))
        storage = infer_dataset_class(folder)
        self.known = tuple(sorted(storage.get_identifiers(folder)))
        self._storage = storage(folder, list(self.cases))
        self._last: tuple[str, list[StoredArray]] | None = None
        self._verified: dict[Path, set[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def shape(self, case: str) -> tuple[int, ...]:
        """Shape (C, Z, Y, X) of a case in voxels; reads no intensities."""
        return tuple(int(n) for n in self._arrays(case)[0].array.shape)

    def read(self, case: str, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Intensities (C, z, y, x), float32, of the spatial ``box`` (three slices inside the case).

        Raises:
            UserError: the file cannot be read or is damaged; every method that opens a case raises the same.
        """
        return self._arrays(case)[0].read((slice(None), *box), np.float32)

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Label map (z, y, x) of the spatial ``box`` as nnU-Net stores it, -1 outside of the image, and its confidence
        (z, y, x) in percent: 100 where there is a label, else 0."""
        labels: NDArray[np.int16] = self._arrays(case)[1].read((slice(0, 1), *box), np.int16)[0]
        return labels, certain(labels)

    def layout(self, case: str) -> tuple[Sequence[int] | None, Sequence[int] | None]:
        """Blosc2 chunks and blocks of a case; None in nnU-Net's old format."""
        image = self._arrays(case)[0].array
        return getattr(image, "chunks", None), getattr(image, "blocks", None)

    @property
    def labelled(self) -> tuple[str, ...]:
        """Cases with labels: all of them, as nnU-Net's training cases are labelled."""
        return self.cases

    def content(self) -> str:
        """Digest of the images' file names and compressed sizes, the same for a copy on another machine.

        A changed image of the same compressed size goes unnoticed: hashing all bytes would take minutes at every start.
        """
        return digest([[file.name, _compressed_size(file)] for file in self._files(".b2nd", ".npz")])

    def label_content(self) -> str:
        """Digest of the label files' bytes: a label map may change without a change of size."""
        return digest([[file.name, _checksum(file)] for file in self._files("_seg.b2nd", ".npz")])

    def _files(self, *endings: str) -> list[Path]:
        files = (Path(self._storage.source_folder) / f"{case}{end}" for case in self.cases for end in endings)
        return [file for file in files if file.exists()]

    def _arrays(self, case: str) -> list[StoredArray]:
        # a sample reads shape, boxes and labels of the same case, which is opened once for all of them
        last = self._last
        if last is None or last[0] != case:
            last = self._last = (case, open_case(self._storage, case, self._verified))
        return last[1]


def _compressed_size(file: Path) -> int:
    """Compressed size in bytes, for a blosc2 array without its metadata.

    The metadata hold the chunks' checksums, whose length differs when a pool is preprocessed again: blosc2's threads
    write the blocks of a chunk in any order.
    """
    if file.suffix == ".npz":
        return file.stat().st_size
    with damage_named(file, recreate_command(file)):
        return int(blosc2.open(urlpath=str(file), mode="r").schunk.cbytes)


def _checksum(file: Path) -> str:
    checksum = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


def certain(labels: NDArray[np.int16]) -> NDArray[np.int16]:
    """Confidence in percent of a label map (z, y, x) that is trusted: 100 where there is a label, else 0."""
    return np.where(labels >= 0, 100, 0).astype(np.int16)
