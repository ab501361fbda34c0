"""Counterfactuals generated on the fly during training, crop by crop, without a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, product
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from nnunet_cfcl.counterfactual.generator.data import Cells
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.whole_cases import (
    change_images,
    draw_noise,
    standardised,
)
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.views.blending import AxisWindows, Windows, outer_shares
from nnunet_cfcl.views.crop_box import CropBox


class DrawnInterventions(NamedTuple):
    """Interventions on n images; ``default_collate`` stacks them to (B, n, ...).

    Attributes:
        intervention: (n,) int64, index of the intervention.
        parents: (n, P) encoded attributes of the image.
        others: (n, P) encoded attributes after the intervention.
        noise_seed: (n,) int64, seed of the posterior's sample; drawn once per image, it identifies the image's rows.
        valid: (n, 2, D) int64, start and stop of the real image within the crop; the rest is padding.
    """

    intervention: Tensor
    parents: Tensor
    others: Tensor
    noise_seed: Tensor
    valid: Tensor


class GeneratorSource:
    """Counterfactuals of a generator that runs in the training process; interventions and new values are drawn.

    Copies in data loading processes only draw and hold no generator.

    Args:
        generator: trained generator, on its own device.
        cells: case -> attribute -> value; a missing case has no attributes.
        interventions: interventions to draw from.
        windows: windows of the generator's patch size.
        patches_per_pass: number of windows in one pass of the generator.
        abduction: see `config.CounterfactualSettings`.
        zero_is_outside: see `whole_cases.SlidingWindowCounterfactuals`.
    """

    name = "generator"

    def __init__(
        self, generator: CounterfactualGenerator, cells: Mapping[str, Cells], interventions: Sequence[Intervention],
        windows: Windows, patches_per_pass: int, abduction: Literal["mean", "sample"], zero_is_outside: bool,
    ) -> None:
        self._generator: CounterfactualGenerator | None = generator
        self._coding, self._hash = generator.coding, digest(generator.identity)
        self._cells, self._interventions, self._windows = cells, tuple(interventions), windows
        self._per_pass, self._abduction, self._zero_is_outside = patches_per_pass, abduction, zero_is_outside

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None}

    def identity(self) -> dict[str, Any]:
        """Hash of the generator, abduction and interventions."""
        return {"source": self.name, "generator": self._hash, "abduction": self._abduction,
                "interventions": [one.name for one in self._interventions]}

    def draw(self, generator: Generator, case: str, box: CropBox, count: int) -> DrawnInterventions:
        """Draw ``count`` interventions, repeated only where there are fewer, and the attributes' new values."""
        available, cells = len(self._interventions), self._cells.get(case, {})
        rounds = [torch.randperm(available, generator=generator) for _ in range(-(-count // available))]
        chosen = torch.cat(rounds)[:count]
        drawn = [self._interventions[k].draw(generator, cells) for k in chosen.tolist()]
        return DrawnInterventions(
            intervention=chosen,
            parents=self._coding.encode(cells).expand(count, -1),
            others=torch.stack([self._coding.encode({**cells, **new}) for new in drawn]),
            noise_seed=torch.randint(0, 2**62, (1,), generator=generator).expand(count),
            valid=torch.tensor(box.valid_range).expand(count, -1, -1),
        )

    @torch.no_grad()
    def apply(self, originals: Tensor, drawn: DrawnInterventions, spacing: Sequence[float]) -> Tensor:
        """Compute counterfactuals of crops (N, C, *crop) of any size; same shape and dtype.

        Padding and voxels outside of the normalisation mask are unchanged. A row depends on its own parameters only; in
        another batch it differs by rounding errors.

        Raises:
            RuntimeError: called in a data loading process.
        """
        if self._generator is None:
            raise RuntimeError("this copy of the source has no generator: call apply in the process that built it")
        fields = [field.to(originals.device) for field in self._fields(self._generator, originals, drawn)]
        images = originals.float()
        changed = change_images(images, fields, self._generator.scale.to(originals.device)).to(originals.dtype)
        return torch.where(self._is_image(originals, drawn.valid), changed, originals)

    def _fields(
        self, generator: CounterfactualGenerator, originals: Tensor, drawn: DrawnInterventions
    ) -> tuple[Tensor, ...]:
        """Blended fields, (N, C, *crop) each, on the generator's device."""
        device, axes = generator.device, self._windows(originals.shape[2:])
        images, parents, others = (t.to(device) for t in (originals.float(), drawn.parents, drawn.others))
        noise = self._noise(generator, drawn)
        fields = torch.zeros(2 if generator.learned_scale else 1, *originals.shape, device=device)
        for placed in _passes(drawn.noise_seed.tolist(), axes, self._per_pass):
            first = [one.rows[0] for one in placed]
            patches = [_patch(images[one.rows[0]], one.starts(axes), axes, drawn.valid[one.rows[0]]) for one in placed]
            interventions = [others[list(rows)] for rows in zip(*(one.rows for one in placed), strict=True)]
            changes = generator.changes(
                torch.stack(patches), parents[first], interventions, noise and [code[first] for code in noise])
            weight = outer_shares([one.shares(axes) for one in placed], device)
            for k, change in enumerate(changes):
                found = torch.stack(standardised(change, generator.scale)[: len(fields)]) * weight
                for number, one in enumerate(placed):
                    _add(fields[:, one.rows[k]], found[:, number], one.starts(axes))
        return fields.unbind(0)

    def _noise(self, generator: CounterfactualGenerator, drawn: DrawnInterventions) -> list[Tensor] | None:
        if self._abduction == "mean":
            return None
        rows = [draw_noise(generator.model, seed, generator.device) for seed in drawn.noise_seed.tolist()]
        return [torch.cat(code) for code in zip(*rows, strict=True)]

    def _is_image(self, originals: Tensor, valid: Tensor) -> Tensor:
        """Mask (N, 1, *crop), False in padding and outside of the normalisation mask."""
        inside = torch.zeros_like(originals[:, :1], dtype=torch.bool)
        for row, (low, high) in zip(inside[:, 0], valid.tolist(), strict=True):
            row[tuple(map(slice, low, high))] = True
        return inside & (originals != 0).any(1, keepdim=True) if self._zero_is_outside else inside


class _Placed(NamedTuple):
    """One window of one image: the image's rows in the batch and the window's index along every axis."""

    rows: tuple[int, ...]
    place: tuple[int, ...]

    def starts(self, axes: Sequence[AxisWindows]) -> list[int]:
        return [axis.starts[index] for axis, index in zip(axes, self.place, strict=True)]

    def shares(self, axes: Sequence[AxisWindows]) -> list[Tensor]:
        return [axis.shares[index] for axis, index in zip(axes, self.place, strict=True)]


def _passes(seeds: Sequence[int], axes: Sequence[AxisWindows], per_pass: int) -> Iterator[list[_Placed]]:
    """Yield the windows of all images in passes whose images have equally many rows (interventions)."""
    rows: dict[int, list[int]] = {}
    for row, seed in enumerate(seeds):
        rows.setdefault(seed, []).append(row)
    places = list(product(*(range(len(axis.starts)) for axis in axes)))
    for _, images in groupby(sorted(rows.values(), key=len), key=len):
        placed = (_Placed(tuple(image), place) for image in images for place in places)
        while chunk := list(islice(placed, per_pass)):
            yield chunk


def _patch(image: Tensor, starts: Sequence[int], axes: Sequence[AxisWindows], valid: Tensor) -> Tensor:
    """Window (C, *patch) of a crop (C, *crop), padded with the image's border values as in the generator's training."""
    patch = image
    for axis, (start, along) in enumerate(zip(starts, axes, strict=True)):
        low, high = valid[:, axis].tolist()
        voxels = torch.arange(start, start + along.shares.shape[1]).clamp(low, high - 1)
        patch = patch.index_select(axis + 1, voxels.to(image.device))
    return patch


def _add(total: Tensor, part: Tensor, starts: Sequence[int]) -> None:
    """Add a window (F, C, *patch) to (F, C, *crop) at ``starts``; voxels outside of the crop are dropped."""
    target: tuple[Any, ...] = (..., *(slice(max(0, s), s + n) for s, n in zip(starts, part.shape[2:], strict=True)))
    there = total[target]
    source: tuple[Any, ...] = (..., *(slice(max(0, -s), max(0, -s) + n)
                                      for s, n in zip(starts, there.shape[2:], strict=True)))
    there += part[source]
