"""Interface of counterfactual sources: parameters are drawn in a worker process and applied on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual.acquisition.effects import AcquisitionParameters, apply_acquisition, draw_acquisition
from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.reader import CaseReader, require_finite
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.views.crop_box import CropBox, read_crop


class CounterfactualSource(Protocol):
    """Source of counterfactuals of crops; picklable. `draw` runs in workers, `apply` on the training device."""

    name: str

    def identity(self) -> dict[str, Any]:
        """JSON-ready description, equal for equivalent sources; part of the settings' hash."""

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> Any:
        """Draw parameters of ``count`` counterfactuals: a NamedTuple of tensors with leading dimension count."""

    def apply(self, originals: Tensor, drawn: Any, spacing: Sequence[float]) -> Tensor:
        """Compute counterfactuals of crops (N, C, *crop) from N drawn rows, spacing in mm; same shape."""


class NoParameters(NamedTuple):
    """Empty parameters of sources that draw nothing."""


class OriginalSource:
    """Source that returns the original images, for methods without counterfactuals."""

    name = "none"

    def identity(self) -> dict[str, Any]:
        """Name of the source."""
        return {"source": self.name}

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> NoParameters:
        """Empty parameters."""
        return NoParameters()

    def apply(self, originals: Tensor, drawn: NoParameters, spacing: Sequence[float]) -> Tensor:
        """The originals, unchanged."""
        return originals


class AcquisitionSource:
    """Analytic interventions on the acquisition: every counterfactual has a newly drawn scanner.

    Args:
        reader: reader of the cases; the intensities of another case are the target of a transfer curve.
        settings: ranges of the effects.
        schemes: nnU-Net's normalisation scheme of each channel.
        dim: number of spatial axes, 2 or 3.
    """

    name = "acquisition"

    def __init__(self, reader: CaseReader, settings: AcquisitionSettings, schemes: Sequence[str], dim: int) -> None:
        self._reader, self._settings, self._schemes, self._dim = reader, settings, tuple(schemes), dim
        self._zero_is_outside = zero_is_outside(schemes)
        self._tables: dict[str, Tensor] = {}

    def identity(self) -> dict[str, Any]:
        """Name and normalisation schemes; the ranges are already part of the settings."""
        return {"source": self.name, "schemes": list(self._schemes)}

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> AcquisitionParameters:
        """Draw one scanner per counterfactual; its transfer curve may match the intensities of another case."""
        others = torch.randint(len(self._reader.cases), (count,), generator=generator).tolist()
        targets = torch.stack([self._table(self._reader.cases[other]) for other in others])
        return draw_acquisition(
            generator, self._settings, self._table(case), targets, self._dim, self._schemes, count
        )

    def apply(self, originals: Tensor, drawn: AcquisitionParameters, spacing: Sequence[float]) -> Tensor:
        """See `apply_acquisition`; padding and voxels outside of the normalisation mask are unchanged."""
        inside = (originals != 0).any(dim=1, keepdim=True) if self._zero_is_outside else None
        return apply_acquisition(originals, drawn, spacing, inside)

    def _table(self, case: str) -> Tensor:
        # cached per worker: tables are small, and every epoch needs them again
        if case not in self._tables:
            spatial = self._reader.shape(case)[1:]
            boxes = [_sampled_box(spatial, position) for position in np.linspace(0, 1, 5)]
            parts = [self._read(case, box) for box in boxes]
            joined = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
            inside = (joined != 0).any(axis=0) if self._zero_is_outside else None
            self._tables[case] = intensity_quantiles(joined, inside=inside)
        return self._tables[case]

    def _read(self, case: str, box: tuple[slice, ...]) -> np.ndarray:
        part = self._reader.read(case, box)
        require_finite(part, f"case '{case}'", box)
        return part


def _sampled_box(spatial: Sequence[int], position: float) -> tuple[slice, ...]:
    """Box at a relative position (0 to 1) along all axes; bounded in size, so that a table is cheap on large cases."""
    depth, sides = 4, [min(n, 256) for n in spatial[1:]]
    first = round(position * max(0, spatial[0] - depth))
    corners = [round(position * (n - side)) for n, side in zip(spatial[1:], sides, strict=True)]
    planes = slice(first, min(first + depth, spatial[0]))
    return (planes, *(slice(c, c + side) for c, side in zip(corners, sides, strict=True)))


def zero_is_outside(schemes: Sequence[str]) -> bool:
    """Whether these normalisations leave exact zeros only outside of the mask and in padding."""
    return set(schemes) <= {"ZScoreNormalization", "CTNormalization"}


class StoredImages(NamedTuple):
    """Counterfactual crops (count, C, *crop) as a NamedTuple, which ``default_collate`` stacks."""

    images: Tensor


class PrecomputedSource:
    """Counterfactuals read from a store, with interventions in random order.

    Args:
        store: store of the counterfactuals.
        name: name of the source.
    """

    def __init__(self, store: CounterfactualStore, name: str = "precomputed") -> None:
        self.store, self.name = store, name

    def identity(self) -> dict[str, Any]:
        """Manifest of the store, and a digest of the names and sizes of its files."""
        store = self.store
        files = sorted((file.name, file.stat().st_size) for file in (store.folder / "cases").glob("*.b2nd"))
        return {
            "source": self.name, "interventions": list(store.interventions), "made_by": store.source,
            "preprocessing": store.preprocessing, "data_identifier": store.data_identifier,
            "files": digest(files),
        }

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> StoredImages:
        """Read the same crop of ``count`` interventions, repeated only where the store has fewer."""
        names = self.store.interventions
        order = torch.cat([torch.randperm(len(names), generator=generator) for _ in range(-(-count // len(names)))])
        chosen = [names[index] for index in order[:count].tolist()]
        return StoredImages(torch.stack([read_crop(box, partial(self._read, case, name)) for name in chosen]))

    def apply(self, originals: Tensor, drawn: StoredImages, spacing: Sequence[float]) -> Tensor:
        """The stored crops, on the device of the originals."""
        return drawn.images.to(originals)

    def _read(self, case: str, name: str, box: tuple[slice, ...]) -> np.ndarray:
        part = self.store.read(case, name, box)
        require_finite(part, f"counterfactual '{name}' of case '{case}'", box)
        return part


def take(parameters: Any, *index: Tensor) -> Any:
    """Index the leading dimensions of all tensors of a NamedTuple, which may be nested."""
    return type(parameters)(*(take(one, *index) if isinstance(one, tuple) else one[index] for one in parameters))
