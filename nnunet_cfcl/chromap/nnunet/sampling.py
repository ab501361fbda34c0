"""Features to fit a colour space on: drawn evenly over cases and, where there are labels, over classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from tqdm import tqdm

from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.decoder_tap import last_decoder_map
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.views.crop_box import CropBox, crop_around

#: Patches of a case that are looked at.
PATCHES = 2


class SampledCase(Protocol):
    """A preprocessed case: its shape (C, Z, Y, X), its intensities and, where there are some, its labels."""

    name: str
    shape: tuple[int, ...]

    def read(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x) of a spatial box inside the case."""

    def labels(self, box: tuple[slice, ...]) -> NDArray[np.int16] | None:
        """(z, y, x); negative where there is none. None: the case has no labels."""


class CaseInMemory:
    """A preprocessed case as an array (C, Z, Y, X), without labels."""

    def __init__(self, name: str, data: NDArray[np.float32]) -> None:
        self.name, self.shape, self._data = name, tuple(data.shape), data

    def read(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x)."""
        return self._data[(slice(None), *box)]

    def labels(self, box: tuple[slice, ...]) -> None:
        """None."""
        return None


class PreprocessedCase:
    """One of nnU-Net's preprocessed cases, with its labels; those of the ignore label count as none."""

    def __init__(self, reader: PreprocessedCases, name: str, ignore_label: int | None) -> None:
        self.name, self.shape, self._reader, self._ignored = name, reader.shape(name), reader, ignore_label

    def read(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x)."""
        return self._reader.read(self.name, box)

    def labels(self, box: tuple[slice, ...]) -> NDArray[np.int16]:
        """(z, y, x), negative where nobody has said what it is."""
        labels, _ = self._reader.labels(self.name, box)
        return labels if self._ignored is None else np.where(labels == self._ignored, np.int16(-1), labels)


def sample_features(
    network: nn.Module, cases: Iterable[SampledCase], count: int, patch_size: Sequence[int], points: int, seed: int,
    device: torch.device, show_progress: bool = True,
) -> Tensor:
    """Features of the network's last decoder map at voxels of the cases.

    Two patches of every case are looked at, one of them around a labelled voxel where there is one; in a patch the
    same number of voxels is drawn for every class, away from borders that a sliding window would not count.

    Args:
        network: nnU-Net's, on ``device``; it is left as it was.
        cases: read one after the other.
        count: of the cases.
        patch_size: (D,) of the plan, in voxels.
        points: voxels in all.
        seed: of the draws.
        device: cpu or cuda.
        show_progress: with a bar, on a terminal.

    Returns:
        (N, F) float32 on the CPU, N at most ``points``.

    Raises:
        UserError: the network has no decoder of nnU-Net's kind; there are no cases.
    """
    per_patch = max(1, points // max(1, count * PATCHES))
    found: list[Tensor] = []
    was_training = network.training
    network.eval()
    hidden = None if show_progress else True
    try:
        with last_decoder_map(network) as features, torch.inference_mode():
            for number, case in enumerate(tqdm(cases, desc="features", total=count, disable=hidden)):
                random = generator_for(seed, number)
                for patch, inside, labels, inner in draw_patches(case, patch_size, random):
                    chosen = draw_voxels(labels, inner, per_patch, random)
                    found.append(features_at(features, patch[None], inside, chosen, device)[0])
    finally:
        network.train(was_training)
    if not found:
        raise UserError("there are no cases to fit the colours on")
    return torch.cat(found)


def features_at(
    features: nn.Module, images: Tensor, inside: tuple[slice, ...], voxels: Tensor, device: torch.device
) -> Tensor:
    """Features of some voxels of patches.

    Args:
        features: gives the last decoder map (N, F, *patch) of images.
        images: (N, C, *patch).
        inside: the part of the patch that lies in the image.
        voxels: (P,) flat indices in that part.
        device: that ``features`` is on.

    Returns:
        (N, P, F) float32 on the CPU.
    """
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        maps = features(images.to(device))
    maps = maps[(slice(None), slice(None), *inside)].flatten(2)
    return maps[:, :, voxels.to(device)].movedim(1, 2).float().cpu()


def draw_patches(
    case: SampledCase, patch_size: Sequence[int], random: Generator
) -> Iterable[tuple[Tensor, tuple[slice, ...], NDArray[np.int16] | None, NDArray[np.bool_]]]:
    """Patches (C, *patch), what of them lies in the image, labels of that part, and what of it is away from borders
    inside the image. A patch of a 2D plan is one slice of a volume; what is missing of a patch is 0 on both sides, as
    nnU-Net has it."""
    for box, own, inner in draw_boxes(case, patch_size, random):
        yield box.pad(case.read(box.inside)), part_inside(box), own, inner


def draw_boxes(
    case: SampledCase, patch_size: Sequence[int], random: Generator, around_label: Sequence[bool] = (True, False)
) -> Iterable[tuple[CropBox, NDArray[np.int16] | None, NDArray[np.bool_]]]:
    """Where patches lie, labels of what of them is in the image, and what of that is away from borders inside the
    image; as many as ``around_label`` says, which is whether a patch is to hold a voxel of a class drawn evenly."""
    spatial = case.shape[1:]
    labels = case.labels(tuple(slice(0, n) for n in spatial))
    for wanted in around_label:
        box = crop_around(_centre(spatial, labels if wanted else None, random), spatial, patch_size)
        inner = np.zeros([part.stop - part.start for part in part_inside(box)], bool)
        inner[tuple(_inner(side, n) for side, n in zip(box.inside[-box.dim :], spatial[-box.dim :]))] = True
        yield box, None if labels is None else labels[box.inside].reshape(inner.shape), inner


def part_inside(box: CropBox) -> tuple[slice, ...]:
    """The part of a patch that lies in the image."""
    return tuple(slice(*ends) for ends in zip(*box.valid_range))


def draw_voxels(
    labels: NDArray[np.int16] | None, inner: NDArray[np.bool_], count: int, random: Generator
) -> Tensor:
    """Flat indices of at most ``count`` voxels of a patch: as many of every class as of any other, where they suffice;
    without labels evenly."""
    candidates = [np.flatnonzero(inner)]
    if labels is not None:
        present = np.unique(labels[inner & (labels >= 0)])
        candidates = [np.flatnonzero(inner & (labels == one)) for one in present] or candidates
    each = max(1, count // len(candidates))
    return torch.cat([torch.from_numpy(voxels)[torch.randperm(len(voxels), generator=random)[:each]]
                      for voxels in candidates])


def _centre(
    spatial: Sequence[int], labels: NDArray[np.int16] | None, random: Generator
) -> tuple[int, ...]:
    """A voxel of a class drawn evenly, or any voxel."""
    classes = [] if labels is None else [one for one in np.unique(labels) if one > 0]
    if labels is None or not classes:
        return tuple(int(torch.randint(n, (), generator=random)) for n in spatial)
    wanted = classes[int(torch.randint(len(classes), (), generator=random))]
    voxels = np.flatnonzero(labels == wanted)
    chosen = voxels[int(torch.randint(len(voxels), (), generator=random))]
    return tuple(int(one) for one in np.unravel_index(chosen, labels.shape))


def _inner(side: slice, n: int) -> slice:
    """The part of a patch's side where a sliding window counts most; up to the border where it is the image's."""
    margin = (side.stop - side.start) // 4
    begin = 0 if side.start == 0 else margin
    return slice(begin, side.stop - side.start - (0 if side.stop == n else margin))
