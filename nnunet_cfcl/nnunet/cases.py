"""Boxes of preprocessed cases, read through nnU-Net's own storage classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

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

    def shape(self, case: str) -> tuple[int, ...]:
        """(C, Z, Y, X) of a case in voxels; reads no intensities."""
        return tuple(int(n) for n in self._storage.load_case(case)[0].shape)

    def content(self) -> str:
        """A digest of the cases' names and compressed sizes: other images, or another preprocessing, change it, while
        a copy on another machine does not."""
        files = (Path(self._storage.source_folder) / f"{case}{end}" for case in self.cases for end in (".b2nd", ".npz"))
        return digest([[file.name, file.stat().st_size] for file in files if file.exists()])

    def read(self, case: str, box: tuple[slice, ...]) -> np.ndarray:
        """Intensities (C, z, y, x), float32, of the spatial ``box`` (three slices inside the case)."""
        return np.asarray(self._storage.load_case(case)[0][(slice(None), *box)], dtype=np.float32)
