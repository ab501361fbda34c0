"""Reader of the images and labels of the pretraining: training cases and pool, manual and silver labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.data.cases import PreprocessedCases, certain
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.files.hashing import digest


@dataclass(frozen=True)
class Labels:
    """Labels that the pretraining uses; by default none.

    Attributes:
        manual: cases whose manual label is used.
        silver: cases whose silver label is used, disjoint from ``manual``.
        reader: reader of the silver labels; None without any.
        confidence: whether silver labels are weighted by their confidence; False trusts them everywhere.
        content: digest of these labels.
    """

    manual: frozenset[str] = frozenset()
    silver: frozenset[str] = frozenset()
    reader: SilverLabels | None = None
    confidence: bool = True
    content: str = ""


class PretrainingCases:
    """Reader of the images and labels of the pretraining; picklable, safe in worker processes.

    Args:
        images: readers of the folders; every case belongs to one of them.
        known: all cases of the dataset and its pool, used or not.
        labels: labels to use.
        patients: case -> patient, for the cases whose patient is known.
        pool: cases of the pool, a part of ``cases``.

    Attributes:
        cases: cases of the pretraining, sorted.
        known: all cases of the dataset and its pool, sorted.
        labelled: cases among ``cases`` that have labels to use, sorted; empty if the method needs none.
        patients: case -> patient, for the cases whose patient is known.
        pool: cases of the pool among ``cases``, sorted.
    """

    def __init__(
        self, images: Sequence[PreprocessedCases], known: Iterable[str], labels: Labels,
        patients: Mapping[str, str] | None = None, pool: Iterable[str] = (),
    ) -> None:
        self._images, self._labels, self.patients = tuple(images), labels, dict(patients or {})
        self.pool = tuple(sorted(pool))
        self._reader = {case: reader for reader in images for case in reader.cases}
        self.cases = tuple(sorted(self._reader))
        self.known = tuple(sorted(known))
        self.labelled = tuple(case for case in self.cases if self.has_labels(case))

    def shape(self, case: str) -> tuple[int, ...]:
        """Shape (C, Z, Y, X) of a case in voxels; reads no intensities."""
        return self._reader[case].shape(case)

    def read(self, case: str, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """Intensities (C, z, y, x), float32, of the spatial ``box`` (three slices inside the case)."""
        return self._reader[case].read(case, box)

    def layout(self, case: str) -> tuple[Sequence[int] | None, Sequence[int] | None]:
        """Blosc2 chunks and blocks of a case; None in nnU-Net's old format."""
        return self._reader[case].layout(case)

    def has_labels(self, case: str) -> bool:
        """Whether a manual or silver label of a case is used."""
        return case in self._labels.manual or case in self._labels.silver

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]] | None:
        """Label map (z, y, x) of the spatial ``box`` and its confidence (z, y, x) in percent.

        The label map has the dataset's values including the ignore label, and -1 where unknown; None for a case without
        labels.
        """
        if case in self._labels.manual:
            return self._reader[case].labels(case, box)
        if case not in self._labels.silver or self._labels.reader is None:
            return None
        labels, confidence = self._labels.reader.read(case, box)
        return labels, confidence if self._labels.confidence else certain(labels)

    def content(self) -> str:
        """Digest of the images and of the labels to use, independent of machine and folders."""
        return digest([[reader.content() for reader in self._images], self._labels.content])

    def image_content(self) -> str:
        """Digest of the images alone."""
        return digest([reader.content() for reader in self._images])
