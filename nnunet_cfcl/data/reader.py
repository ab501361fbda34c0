"""How preprocessed images are read: the protocol of every reader of cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nnunet_cfcl.errors import UserError


class CaseReader(Protocol):
    """Boxes of preprocessed cases; spatial boxes have three slices, 2D data one or more slices along Z."""

    @property
    def cases(self) -> Sequence[str]:
        """The cases to use."""

    @property
    def known(self) -> Sequence[str]:
        """All cases of the dataset, those that are not used included."""

    @property
    def labelled(self) -> Sequence[str]:
        """Those of ``cases`` that have labels."""

    def shape(self, case: str) -> tuple[int, ...]:
        """(C, Z, Y, X) in voxels."""

    def read(self, case: str, box: tuple[slice, ...]) -> np.ndarray:
        """Intensities (C, z, y, x), float32."""

    def labels(self, case: str, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        """Label map (z, y, x), below 0 where it says nothing, and its confidence in percent; None without labels."""


def require_finite(part: np.ndarray, what: str, box: tuple[slice, ...]) -> None:
    """Refuse NaN and infinite intensities, which would spoil every weight of the network.

    Raises:
        UserError: names ``what`` and the voxels.
    """
    if not np.isfinite(part).all():
        where = ", ".join(f"{axis.start}:{axis.stop}" for axis in box)
        raise UserError(
            f"{what} holds values that are not finite (NaN or infinite) in voxels [{where}]",
            "`nnunet_cfcl doctor -d DATASET -c CONFIGURATION --data` lists every such case"
        )
