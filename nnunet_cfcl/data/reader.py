"""The protocol of every reader of preprocessed cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nnunet_cfcl.errors import UserError


class CaseReader(Protocol):
    """Read access to boxes of preprocessed cases.

    A spatial box has three slices (Z, Y, X); 2D data have one or more slices along Z.
    """

    @property
    def cases(self) -> Sequence[str]:
        """Case identifiers to use."""

    @property
    def known(self) -> Sequence[str]:
        """All case identifiers of the dataset, used or not."""

    @property
    def labelled(self) -> Sequence[str]:
        """Cases among ``cases`` that have labels."""

    def shape(self, case: str) -> tuple[int, ...]:
        """Shape (C, Z, Y, X) of a case in voxels."""

    def read(self, case: str, box: tuple[slice, ...]) -> np.ndarray:
        """Intensities (C, z, y, x) of a box, float32."""

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        """Label map (z, y, x), negative where unknown, and its confidence in percent; None without labels."""


def require_finite(part: np.ndarray, what: str, box: tuple[slice, ...]) -> None:
    """Reject NaN and infinite intensities, which would propagate to every weight of the network.

    Args:
        part: intensities of the box.
        what: name of the image, for the error.
        box: spatial slices (Z, Y, X).

    Raises:
        UserError: an intensity is not finite.
    """
    if not np.isfinite(part).all():
        where = ", ".join(f"{axis.start}:{axis.stop}" for axis in box)
        raise UserError(
            f"{what} holds values that are not finite (NaN or infinite) in voxels [{where}]",
            "list every such case with `nnunet_cfcl doctor -d DATASET -c CONFIGURATION --data` and correct its image"
        )
