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

#: Patches per case.
PATCHES = 2


class SampledCase(Protocol):
    """Preprocessed case: shape (C, Z, Y, X), intensities and, if it has any, labels."""

    name: str
    shape: tuple[int, ...]

    def read(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x) of a spatial box inside the case."""

    def labels(self, box: tuple[slice, ...]) -> NDArray[np.int16] | None:
        """(z, y, x); negative where a voxel has no label. None: the case has no labels."""


class CaseInMemory:
    """Preprocessed case as an array (C, Z, Y, X), without labels."""

    def __init__(self, name: str, data: NDArray[np.float32]) -> None:
        self.name, self.shape, self._data = name, tuple(data.shape), data

    def read(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x)."""
        return self._data[(slice(None), *box)]

    def labels(self, box: tuple[slice, ...]) -> None:
        """None."""
        return None


class PreprocessedCase:
    """Preprocessed case of nnU-Net with its labels; the ignore label counts as no label."""

    def __init__(self, reader: PreprocessedCases, name: str, ignore_label: int | None) -> None:
        self.name, self.shape, self._reader, self._ignored = name, reader.shape(name), reader, ignore_label

    def read(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        """(C, z, y, x)."""
        return self._reader.read(self.name, box)

    def labels(self, box: tuple[slice, ...]) -> NDArray[np.int16]:
        """(z, y, x), negative where a voxel has no label."""
        labels, _ = self._reader.labels(self.name, box)
        return labels if self._ignored is None else np.where(labels == self._ignored, np.int16(-1), labels)


def sample_features(
    network: nn.Module, cases: Iterable[SampledCase], count: int, patch_size: Sequence[int], points: int, seed: int,
    device: torch.device, show_progress: bool = True,
) -> Tensor:
    """Sample features of the network's last decoder map at voxels of the cases.

    Two patches of every case are drawn, one of them around a labelled voxel if there is one; in a patch the same number
    of voxels is drawn for every class, away from borders, which count little in sliding windows.

    Args:
        network: nnU-Net's network, on ``device``; its mode is restored.
        cases: cases, read one after the other.
        count: number of cases.
        patch_size: (D,) of the plan, in voxels.
        points: number of voxels in all.
        seed: seed of the draws.
        device: cpu or cuda.
        show_progress: whether to show a progress bar, on a terminal.

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
        raise UserError("there are no cases to fit the colour space on")
    return torch.cat(found)


def features_at(
    features: nn.Module, images: Tensor, inside: tuple[slice, ...], voxels: Tensor, device: torch.device
) -> Tensor:
    """Compute features at some voxels of patches.

    Args:
        features: module that returns the last decoder map (N, F, *patch) of images.
        images: (N, C, *patch).
        inside: part of the patch that lies in the image.
        voxels: (P,) flat indices in that part.
        device: device of ``features``.

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
    """Draw patches of a case; a patch of a 2D plan is one slice of a volume, padded with 0 on both sides as in nnU-Net.

    Returns:
        patch (C, *patch), its part in the image, labels of that part, and the voxels of it that are away from borders
        inside the image.
    """
    for box, own, inner in draw_boxes(case, patch_size, random):
        yield box.pad(case.read(box.inside)), part_inside(box), own, inner


def draw_boxes(
    case: SampledCase, patch_size: Sequence[int], random: Generator, around_label: Sequence[bool] = (True, False)
) -> Iterable[tuple[CropBox, NDArray[np.int16] | None, NDArray[np.bool_]]]:
    """Draw boxes of patches.

    Args:
        case: case of the patches.
        patch_size: (D,) of the plan, in voxels.
        random: generator of the draws.
        around_label: for every patch, whether its centre is a voxel of a class drawn uniformly.

    Returns:
        box, labels of its part in the image, and the voxels of that part that are away from borders inside the image.
    """
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
    """Draw flat indices of at most ``count`` voxels of a patch: the same number of every class, where they suffice;
    uniformly without labels."""
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
    """Draw a voxel of a class drawn uniformly, or any voxel."""
    classes = [] if labels is None else [one for one in np.unique(labels) if one > 0]
    if labels is None or not classes:
        return tuple(int(torch.randint(n, (), generator=random)) for n in spatial)
    wanted = classes[int(torch.randint(len(classes), (), generator=random))]
    voxels = np.flatnonzero(labels == wanted)
    chosen = voxels[int(torch.randint(len(voxels), (), generator=random))]
    return tuple(int(one) for one in np.unravel_index(chosen, labels.shape))


def _inner(side: slice, n: int) -> slice:
    """Part of a patch's side where a sliding window counts most; up to the border where it is the image's."""
    margin = (side.stop - side.start) // 4
    begin = 0 if side.start == 0 else margin
    return slice(begin, side.stop - side.start - (0 if side.stop == n else margin))
