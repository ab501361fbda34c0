"""What makes a network's features comparable as colours: one reduction, one plane, one colour wheel for all images."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from zipfile import ZIP_STORED

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.chromap.ellipse import minimum_volume_enclosing_ellipse
from nnunet_cfcl.chromap.landmarks import choose_landmarks, extend
from nnunet_cfcl.chromap.palettes import Palette, colors
from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as
from nnunet_cfcl.files.atomic import replace_atomically

Reducer = Literal["umap", "pca"]

FORMAT = 1
#: UMAP's own defaults; fewer landmarks than this are too few neighbours for a plane that is curved.
UMAP_NEIGHBOURS, UMAP_MIN_DISTANCE = 15, 0.1
#: Neighbours that say where a voxel lies, see `landmarks.extend`.
NEIGHBOURS = 4
#: A spread below this share of the feature's size, or of the largest spread of the principal components, is rounding.
ROUNDING = 1e-6
#: Numbers converted to float32 at once, where features come in half precision.
BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class ColorSpace:
    """Features of one network -> plane -> colour.

    Attributes:
        weight, bias: (k, F) and (k,) float32; reduced = weight @ features + bias, which standardises the features and
            projects them on principal components. With ``reducer`` "pca" k is 2, and this is the plane already.
        landmarks, positions: (L, k) reduced features and their places (L, 2) in the unit disc, float32; none with
            "pca".
        reducer: "umap" or "pca", what was used.
        palette: "hsv" or "oklch".
        neighbours: landmarks that say where a point lies.
        identity: digest of the model that the features are of; "" is unknown.
        fallback: why ``reducer`` is not what was asked for, or why all is at the centre; "" where nothing was amiss.
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
        """Number F of features it was fitted on."""
        return self.weight.shape[1]

    @property
    def components(self) -> int:
        """Number k of reduced features."""
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it works without copies."""
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

        Two kinds of features that UMAP cannot place still give a space: too few different samples for it are placed by
        the first two components; where all are alike, or only one or none is left to tell apart, everything is at the
        centre. ``fallback`` says so.

        Args:
            features: (N, F), N >= 1, of any number type.
            seed: of landmarks and UMAP.
            reducer: "pca" takes the first two principal components as the plane.
            components: of the reduced features, at least 2, for "umap".
            landmarks: points that UMAP places.
            coverage: share of the placed points that the ellipse encloses, in (0, 1]; the others are put on its rim.
            palette: of the colours.
            identity: of the model.

        Raises:
            ValueError: another shape, settings out of range.
            UserError: features that are not finite.
        """
        samples = _checked(features)
        if reducer not in get_args(Reducer) or palette not in get_args(Palette):
            raise ValueError(f"unknown reducer {reducer!r} or palette {palette!r}")
        if components < 2 or landmarks < 1 or not 0 < coverage <= 1:
            raise ValueError(f"expected components >= 2, landmarks >= 1 and a coverage in (0, 1], found {components}, "
                             f"{landmarks} and {coverage}")
        weight, bias = _principal_components(samples, components if reducer == "umap" else 2)
        rest: dict[str, Any] = {"palette": palette, "identity": identity}
        if not weight.any():
            return cls._affine(weight[:2], bias[:2], fallback="all samples are alike", **rest)
        reduced = samples @ weight.T + bias
        fallback = ""
        if reducer == "umap":
            marks = reduced[choose_landmarks(reduced, landmarks, seed)]
            placed = _umap(marks, seed)
            if isinstance(placed, Tensor):
                turn, shift = _to_disc(placed, marks[:, :2], coverage)
                positions = _clipped(placed @ turn.T + shift)
                return cls(weight.float(), bias.float(), marks.float(), positions.float(), "umap", **rest)
            fallback = placed
        plane = reduced[:, :2]
        turn, shift = _to_disc(plane, plane, coverage)
        return cls._affine(turn @ weight[:2], turn @ bias[:2] + shift, fallback=fallback, **rest)

    @classmethod
    def _affine(cls, weight: Tensor, bias: Tensor, **rest: Any) -> ColorSpace:
        nothing = torch.empty(0, 2)
        return cls(weight.float(), bias.float(), nothing, nothing, "pca", **rest)

    def reduce(self, channels: Tensor) -> Tensor:
        """Features (F, *S) of any float type -> (k, *S) of the same type, on their device.

        Everything is computed in float32. In half precision, what is too large becomes the largest number.

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

        Never NaN: features that are not finite count as nothing, or as very large.

        Raises:
            ValueError: another number of reduced features.
        """
        if reduced.ndim < 1 or len(reduced) != self.components:
            raise ValueError(f"expected ({self.components}, *S) reduced features, found {tuple(reduced.shape)}")
        points = reduced.reshape(self.components, -1).T
        if self.reducer == "pca":
            placed = _clipped(points.float().nan_to_num(0, 1e15, -1e15))
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
        """On another device, so that nothing is copied for tensors there."""
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
        """The opposite of `save`, on the CPU.

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


class _Affine(NamedTuple):
    """x -> matrix @ x + shift."""

    matrix: Tensor
    shift: Tensor


def _checked(features: Tensor | NDArray[Any]) -> Tensor:
    """(N, F) float64 on the CPU."""
    samples = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if samples.ndim != 2 or not samples.numel():
        raise ValueError(f"expected features (N, F), at least one, found {tuple(samples.shape)}")
    bad = int((~samples.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"{bad} of {len(samples)} samples have features that are not finite (NaN or infinite)", "a "
                        "network whose training diverged gives such features")
    return samples


def _principal_components(samples: Tensor, components: int) -> _Affine:
    """Standardisation and projection, ordered by variance; (k, F) with 2 <= k <= components.

    Rows that would tell only rounding are zero, or left out. Signs are such that each component's third moment is
    positive: they do not depend on the order of samples, nor on the sign of a feature.
    """
    mean, spread = samples.mean(0), samples.std(0, correction=0)
    varies = spread > ROUNDING * mean.abs().clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(varies, 1 / spread.where(varies, 1), 0)
    standard = (samples - mean) * scale
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(samples))
    kept = int((values > ROUNDING * values[-1].clamp_min(ROUNDING)).sum())
    axes = vectors.flip(1)[:, : min(components, kept)].T
    thirds = (standard @ axes.T).pow(3).sum(0)
    axes = axes * torch.where(thirds < 0, -1.0, 1.0)[:, None]
    axes = torch.cat([axes, axes.new_zeros(max(0, 2 - len(axes)), len(mean))])
    weight = axes * scale
    return _Affine(weight, -(weight @ mean))


def _umap(landmarks: Tensor, seed: int) -> Tensor | str:
    """Places (L, 2) float64 of landmarks (L, k), or why there are none."""
    if len(landmarks) <= UMAP_NEIGHBOURS:
        return f"UMAP needs more than {UMAP_NEIGHBOURS} different samples, found {len(landmarks)}"
    if not landmarks[:, 1].any():
        return "the samples lie on a line"
    # slow to import, and needed for fitting alone
    from umap import UMAP

    # an own beginning keeps the coarse order of the components, and does not hang on eigenvectors of a graph
    start = landmarks[:, :2].numpy().astype(np.float32)
    model = UMAP(n_neighbors=UMAP_NEIGHBOURS, min_dist=UMAP_MIN_DISTANCE, init=start, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placed = torch.from_numpy(np.asarray(model.fit_transform(landmarks.numpy().astype(np.float32)))).double()
    return placed if placed.isfinite().all() else "UMAP found no finite places"


def _to_disc(places: Tensor, guide: Tensor, coverage: float) -> _Affine:
    """Maps the ellipse around places (N, 2) to the unit disc, turned and mirrored towards the guide (N, 2)."""
    found = minimum_volume_enclosing_ellipse(places.numpy(), coverage=coverage)
    centre, form = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in found)
    squares, axes = torch.linalg.eigh(form)
    round_ = (axes * squares.clamp_min(0).sqrt()) @ axes.T
    # the orthogonal map that takes places nearest to the guide (Schönemann 1966); for equal weights of its two axes
    guide = guide - guide.mean(0)
    guide = guide / guide.std(0, correction=0).clamp_min(math.sqrt(torch.finfo(torch.float64).tiny))
    left, _, right = torch.linalg.svd(guide.T @ ((places - centre) @ round_.T))
    turn = left @ right @ round_
    return _Affine(turn, -(turn @ centre))


def _clipped(places: Tensor) -> Tensor:
    """Places (N, 2) within the unit disc; those outside are moved to the rim straight towards the centre."""
    return places / torch.linalg.vector_norm(places, dim=1, keepdim=True).clamp_min(1)
