"""Colour space of a network's features: one reduction, one plane and one colour wheel for all images."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import ZIP_STORED

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.chromap.fitting import checked_samples, clipped, principal_components, to_disc, umap_places
from nnunet_cfcl.chromap.landmarks import choose_landmarks, extend
from nnunet_cfcl.chromap.palettes import Palette, colors
from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as
from nnunet_cfcl.files.atomic import replace_atomically

Reducer = Literal["umap", "pca"]

FORMAT = 1
#: Landmarks that determine the place of a voxel, see `landmarks.extend`.
NEIGHBOURS = 4
#: Numbers converted to float32 at once, where features come in half precision.
BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class ColorSpace:
    """Features of one network -> plane -> colour.

    Attributes:
        weight, bias: (k, F) and (k,) float32; reduced = weight @ features + bias, which standardises the features and
            projects them on principal components. With ``reducer`` "pca" k is 2, and this is the plane already.
        landmarks, positions: (L, k) reduced features and their places (L, 2) in the unit disc, float32; empty with
            "pca".
        reducer: "umap" or "pca", the method that was used.
        palette: "hsv" or "oklch".
        neighbours: number of landmarks that determine the place of a point.
        identity: digest of the model's weights; "" is unknown.
        fallback: reason for another ``reducer`` than requested, or for a space with all features at the centre; "" if
            there is none.
    """

    weight: Tensor
    bias: Tensor
    landmarks: Tensor
    positions: Tensor
    reducer: Reducer
    palette: Palette = "hsv"
    neighbours: int = NEIGHBOURS
    identity: str = ""
    fallback: str = ""

    def __post_init__(self) -> None:
        width, count = self.weight.shape[0], len(self.landmarks)
        shapes = {name: tuple(getattr(self, name).shape) for name in _ARRAYS}
        expected = {"weight": (width, self.features), "bias": (width,), "landmarks": (count, width),
                    "positions": (count, 2)}
        if shapes != expected:
            raise ValueError(f"expected shapes {expected}, found {shapes}")
        if self.reducer not in get_args(Reducer) or self.palette not in get_args(Palette):
            raise ValueError(f"unknown reducer {self.reducer!r} or palette {self.palette!r}")
        if not isinstance(self.neighbours, int) or not isinstance(self.identity, str):
            raise ValueError(f"{self.neighbours!r} neighbours, identity {self.identity!r}")
        if self.neighbours < 1 or (self.reducer == "umap" and not count) or (self.reducer == "pca" and width != 2):
            raise ValueError(f"{count} landmarks in {width} dimensions with {self.neighbours} neighbours cannot place "
                             f"anything by {self.reducer}")

    @property
    def features(self) -> int:
        """Number F of features."""
        return self.weight.shape[1]

    @property
    def components(self) -> int:
        """Number k of reduced features."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the tensors, on which nothing is copied."""
        return self.weight.device

    @classmethod
    def fit(
        cls, features: Tensor | NDArray[Any], seed: int = 0, *, reducer: Reducer = "umap", components: int = 8,
        landmarks: int = 2000, coverage: float = 0.99, palette: Palette = "hsv", identity: str = "",
    ) -> ColorSpace:
        """Fit on features of many images. The same features, seed and versions of libraries give the same space.

        Each feature is standardised; principal components; UMAP (McInnes, Healy and Melville 2018, arXiv 1802.03426)
        of landmarks to the plane, begun at the first two components; the ellipse around them becomes the unit disc,
        turned and mirrored so that it follows the first two components as nearly as it can.

        Two kinds of features that UMAP cannot place still give a space: too few different samples are placed by the
        first two components; where all samples are alike, all are placed at the centre. ``fallback`` then holds the
        reason.

        Args:
            features: (N, F), N >= 1, of any number type.
            seed: seed of landmarks and UMAP.
            reducer: "pca" takes the first two principal components as the plane.
            components: number k of reduced features, at least 2, for "umap".
            landmarks: number of points that UMAP places.
            coverage: share of the placed points that the ellipse encloses, in (0, 1]; the others are put on its rim.
            palette: palette of the colours.
            identity: digest of the model's weights.

        Raises:
            ValueError: another shape, settings out of range.
            UserError: features that are not finite.
        """
        samples = checked_samples(features)
        if reducer not in get_args(Reducer) or palette not in get_args(Palette):
            raise ValueError(f"unknown reducer {reducer!r} or palette {palette!r}")
        if components < 2 or landmarks < 1 or not 0 < coverage <= 1:
            raise ValueError(f"expected components >= 2, landmarks >= 1 and a coverage in (0, 1], found {components}, "
                             f"{landmarks} and {coverage}")
        weight, bias = principal_components(samples, components if reducer == "umap" else 2)
        rest: dict[str, Any] = {"palette": palette, "identity": identity}
        if not weight.any():
            return cls._affine(weight[:2], bias[:2], fallback="all samples are alike", **rest)
        reduced = samples @ weight.T + bias
        fallback = ""
        if reducer == "umap":
            marks = reduced[choose_landmarks(reduced, landmarks, seed)]
            placed = umap_places(marks, seed)
            if isinstance(placed, Tensor):
                turn, shift = to_disc(placed, marks[:, :2], coverage)
                positions = clipped(placed @ turn.T + shift)
                return cls(weight.float(), bias.float(), marks.float(), positions.float(), "umap", **rest)
            fallback = placed
        plane = reduced[:, :2]
        turn, shift = to_disc(plane, plane, coverage)
        return cls._affine(turn @ weight[:2], turn @ bias[:2] + shift, fallback=fallback, **rest)

    @classmethod
    def _affine(cls, weight: Tensor, bias: Tensor, **rest: Any) -> ColorSpace:
        nothing = torch.empty(0, 2)
        return cls(weight.float(), bias.float(), nothing, nothing, "pca", **rest)

    def reduce(self, channels: Tensor) -> Tensor:
        """Features (F, *S) of any float type -> (k, *S) of the same type, on their device.

        Computed in float32. Values too large for half precision become its largest number.

        Raises:
            UserError: another number of features.
        """
        if channels.ndim < 1 or len(channels) != self.features:
            raise UserError(f"colour space of another model: found {len(channels) if channels.ndim else 0} features, "
                            f"expected {self.features}")
        weight, bias = self.weight.to(channels.device), self.bias.to(channels.device)[:, None]
        flat = channels.reshape(self.features, -1)
        # within a network's autocast the products would be rounded to half precision
        with torch.autocast(channels.device.type, enabled=False):
            if flat.dtype == torch.float32:
                return torch.addmm(bias, weight, flat).view(-1, *channels.shape[1:])
            most = torch.finfo(flat.dtype).max
            reduced = flat.new_empty(len(weight), flat.shape[1])
            columns = max(1, BLOCK // self.features)
            for start in range(0, flat.shape[1], columns):
                piece = slice(start, start + columns)
                reduced[:, piece] = torch.addmm(bias, weight, flat[:, piece].float()).clamp_(-most, most)
        return reduced.view(-1, *channels.shape[1:])

    def place(self, reduced: Tensor) -> Tensor:
        """Reduced features (k, *S) of any float type -> coordinates (2, *S) float32 in the unit disc, on their device.

        Never NaN: NaN counts as 0, infinite features count as very large ones.

        Raises:
            ValueError: another number of reduced features.
        """
        if reduced.ndim < 1 or len(reduced) != self.components:
            raise ValueError(f"expected ({self.components}, *S) reduced features, found {tuple(reduced.shape)}")
        points = reduced.reshape(self.components, -1).T
        if self.reducer == "pca":
            placed = clipped(points.float().nan_to_num(0, 1e15, -1e15))
        else:
            placed = extend(points, self.landmarks, self.positions, self.neighbours)
        return placed.T.reshape(2, *reduced.shape[1:])

    def color(self, disc: Tensor) -> Tensor:
        """Coordinates (2, *S) -> colours (*S, 3) uint8, see `palettes.colors`."""
        return colors(disc.movedim(0, -1), self.palette)

    def transform(self, features: Tensor | NDArray[Any]) -> Tensor | NDArray[np.uint8]:
        """Features (N, F) -> colours (N, 3) uint8, an array for an array.

        Raises:
            UserError: another number of features.
        """
        given = torch.as_tensor(features)
        if given.ndim != 2:
            raise ValueError(f"expected features (N, F), found {tuple(given.shape)}")
        found = self.color(self.place(self.reduce(given.float().T)))
        return found if isinstance(features, Tensor) else found.numpy()

    def to(self, device: torch.device | str) -> ColorSpace:
        """The same space on another device, so that nothing is copied for tensors there."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _ARRAYS})

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write an npz file of plain arrays, atomically."""
        content = {name: getattr(self, name).cpu().numpy() for name in _ARRAYS}
        content |= {name: np.array(getattr(self, name)) for name in _PLAIN}

        def write(temporary: Path) -> None:
            # given a name instead, numpy would append .npz to it
            with open(temporary, "wb") as handle:
                np.savez(handle, format=np.array(FORMAT), **content)

        replace_atomically(file, write)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> ColorSpace:
        """Read a file of `save`, on the CPU.

        Raises:
            UserError: the file is missing, damaged, no colour space, or of a newer version.
        """
        if not os.path.exists(file):
            raise UserError(f"there is no colour space {file}")
        content: dict[str, Any] = {}
        with foreign_errors_as(lambda error: UserError(
                f"{file} cannot be read as a colour space ({first_line(error)})",
                "delete it; `nnunet_cfcl chromap` and `nnunet_cfcl predict` then fit a new one")):
            with open(file, "rb") as handle, np.load(handle, allow_pickle=False) as stored:
                # written without compression: a small compressed file could unpack to any size
                if any(part.compress_type != ZIP_STORED for part in stored.zip.infolist()):
                    raise ValueError("compressed arrays")
                version = int(stored["format"])
                if version > FORMAT:
                    raise UserError(f"{file} is a colour space of format {version}, this version of nnunet_cfcl reads "
                                    f"up to {FORMAT}", "pip install -U nnunet_cfcl")
                content |= {name: torch.from_numpy(stored[name].astype(np.float32)) for name in _ARRAYS}
                if not all(values.isfinite().all() for values in content.values()):
                    raise ValueError("numbers that are not finite")
                content |= {name: stored[name].item() for name in _PLAIN}
            space = cls(**content)
        return space


_ARRAYS = ("weight", "bias", "landmarks", "positions")
_PLAIN = tuple(one.name for one in fields(ColorSpace) if one.name not in _ARRAYS)
