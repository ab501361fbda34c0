"""Sliding-window counterfactuals of whole cases: the generator's changes in overlapping windows are blended.

An intervention is a field over the image (method, section 1), and only fields are blended: the detail of the image
itself is never averaged. A case is processed along its first axis: its planes are finished, and released, as soon as no
further window overlaps them, so that neither the case nor its counterfactuals are ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_cfcl.counterfactual.generator.generator import Change, CounterfactualGenerator, IntensityScale, per_channel
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.data.reader import CaseReader, require_finite
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.views.blending import Windows, forget_planes, outer_shares
from nnunet_cfcl.views.crop_box import CropBox

#: Bound of the fields before they are converted to half precision, whose largest number is 65504.
HALF_LIMIT = 6e4
#: Planes of a case in one slab.
PLANES = 16


@dataclass(frozen=True)
class CaseChange:
    """Interventions on one case.

    Attributes:
        case: name of the case.
        parents: (P,) encoded attributes of the case.
        others: (K, P) encoded attributes after each of the K interventions.
        noise_seed: seed of the posterior's sample, shared by all windows so that they agree where they overlap; None:
            the posterior's mean.
    """

    case: str
    parents: Tensor
    others: Tensor
    noise_seed: int | None = None


class Slab(NamedTuple):
    """Consecutive planes of a case's counterfactuals.

    Attributes:
        case: name of the case.
        images: (K, C, z, Y, X) float32 on the CPU, preprocessed intensities.
    """

    case: str
    images: Tensor


class SlidingWindowCounterfactuals:
    """Compute the counterfactuals of whole cases in overlapping windows.

    Memory on the device: one pass of the generator and its output fields. On the CPU, for K interventions and a patch
    of z planes: 2 K C z Y X bytes (twice that with a learned scale) and the windows of two passes.

    Args:
        generator: trained generator.
        reader: reader of the cases.
        windows: windows of the generator's patch size.
        patches_per_pass: upper limit of windows in one pass, of one or several cases. A pass has the largest power of
            two of windows within it, and the last pass is filled up, so that on a CPU a case's counterfactuals do not
            depend on the cases processed with it.
        zero_is_outside: whether voxels with zeros in all channels lie outside of the normalisation mask and stay zero.
    """

    def __init__(
        self, generator: CounterfactualGenerator, reader: CaseReader, windows: Windows, patches_per_pass: int,
        zero_is_outside: bool,
    ) -> None:
        self.generator, self.reader, self._windows = generator, reader, windows
        # On a CPU the order of summation depends on the size of a pass and, unless that is a power of two, on the
        # position in it: after a resume the same window would differ in its last digits.
        self._per_pass, self._zero_is_outside = 1 << (patches_per_pass.bit_length() - 1), zero_is_outside
        self._scale = generator.scale.to(torch.device("cpu"))
        self._fields = 2 if generator.learned_scale else 1

    def slabs(self, cases: Iterable[CaseChange]) -> Iterator[Slab]:
        """Yield all planes of all cases, in order; every case needs the same number of interventions.

        Raises:
            UserError: a case or one of its counterfactuals is not finite.
        """
        windows = chain.from_iterable(map(self._windows_of, cases))
        before = None
        while batch := list(islice(windows, self._per_pass)):
            # the GPU computes this pass while the previous one is blended here and the next one is read
            launched = self._launch(batch)
            if before is not None:
                yield from self._collect(before)
            before = launched
        if before is not None:
            yield from self._collect(before)

    def _windows_of(self, job: CaseChange) -> Iterator[_Window]:
        shape = tuple(self.reader.shape(job.case))
        axes = self._windows(shape[1:])
        case = _Case(job, shape, axes[0].shares.shape[1], self._fields)
        if job.noise_seed is not None:
            case.noise = draw_noise(self.generator.model, job.noise_seed, torch.device("cpu"))
        size, dim = tuple(axis.shares.shape[1] for axis in axes), len(self.generator.patch_size)
        places = list(product(*(range(len(axis.starts)) for axis in axes)))
        for place in places:
            start = tuple(axis.starts[index] for axis, index in zip(axes, place))
            box = CropBox(start, size, shape[1:], dim)
            part = self.reader.read(job.case, box.inside)
            require_finite(part, f"case '{job.case}'", box.inside)
            last = place == places[-1]
            # windows without image content change nothing, but the last window completes the case
            if last or not self._zero_is_outside or part.any():
                shares = tuple(axis.shares[index] for axis, index in zip(axes, place))[-dim:]
                yield _Window(case, box, box.extend(part), shares, last)

    def _launch(self, windows: list[_Window]) -> _Launched:
        """Start a pass; the transfer of its fields from the device may still be running on return."""
        filled = windows + windows[-1:] * (self._per_pass - len(windows))
        jobs = [window.case.job for window in filled]
        device, interventions = self.generator.device, len(jobs[0].others)
        noise = None
        if windows[0].case.noise is not None:
            codes = zip(*(window.case.noise or () for window in filled), strict=True)
            noise = [torch.cat(code).to(device) for code in codes]
        changes = self.generator.changes(
            torch.stack([window.image for window in filled]), torch.stack([one.parents for one in jobs]),
            [torch.stack([one.others[k] for one in jobs]) for k in range(interventions)], noise)
        weight = outer_shares([window.shares for window in filled], device)
        halves = [_half(field * weight) for change in changes
                  for field in standardised(change, self.generator.scale)[: self._fields]]
        fields = torch.stack(halves, 1)[: len(windows)].unflatten(1, (interventions, self._fields))
        fields = fields.to("cpu", non_blocking=True)
        done = None
        if device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return _Launched(windows, fields, done)

    def _collect(self, launched: _Launched) -> Iterator[Slab]:
        """Add the fields of a pass to their cases and yield the planes that are complete."""
        if launched.done is not None:
            launched.done.synchronize()
        for window, fields in zip(launched.windows, launched.fields, strict=True):
            yield from self._slabs(window.case, max(0, window.box.start[0]))
            window.case.add(window.box, fields)
            if window.last:
                yield from self._slabs(window.case, window.case.shape[1])

    def _slabs(self, case: _Case, end: int) -> Iterator[Slab]:
        """Yield the planes before plane ``end``."""
        while case.first < end:
            first = case.first
            for fields in case.take(end - first).split(PLANES, 3):
                yield Slab(case.job.case, self._changed(case, first, fields))
                first += fields.shape[3]

    def _changed(self, case: _Case, first: int, fields: Tensor) -> Tensor:
        """Counterfactuals (K, C, z, Y, X) from plane ``first`` on."""
        box = (slice(first, first + fields.shape[3]), *(slice(0, n) for n in case.shape[2:]))
        images = torch.from_numpy(self.reader.read(case.job.case, box))[None]
        changed = change_images(images, fields.unbind(1), self._scale)
        if not changed.isfinite().all():
            raise UserError(f"the generator's counterfactuals of case '{case.job.case}' are not finite",
                            "train it again with a lower generator.initial_lr")
        if self._zero_is_outside:
            changed.masked_fill_((images == 0).all(1, keepdim=True), 0)
        return changed


class _Case:
    """A case in progress: the blended fields of the planes that further windows overlap.

    Args:
        job: interventions on the case.
        shape: (C, Z, Y, X) of the case.
        depth: number of planes of a window.
        fields: number of fields per intervention.
    """

    def __init__(self, job: CaseChange, shape: tuple[int, ...], depth: int, fields: int) -> None:
        self.job, self.shape, self.first = job, shape, 0
        self.noise: list[Tensor] | None = None
        self._size = (len(job.others), fields, shape[0], min(depth, shape[1]), *shape[2:])

    @cached_property
    def _sums(self) -> Tensor:
        # allocated with the first field: windows of the next case are read while this case is in progress
        return torch.zeros(self._size, dtype=torch.float16)

    def add(self, box: CropBox, fields: Tensor) -> None:
        """Add the weighted fields of one window, (K, F, C, *patch) in half precision."""
        low, high = box.valid_range
        inside: tuple[Any, ...] = (..., *(slice(*ends) for ends in zip(low, high, strict=True)))
        planes, *plane = box.inside
        there: tuple[Any, ...] = (..., slice(planes.start - self.first, planes.stop - self.first), *plane)
        self._sums[there] += fields[inside] if box.dim == 3 else fields[inside].unsqueeze(3)

    def take(self, count: int) -> Tensor:
        """Remove and return the fields (K, F, C, z, Y, X) of the next planes, at most ``count``."""
        count = min(count, self._size[3])
        taken = self._sums[:, :, :, :count].clone()
        forget_planes(self._sums, 3, count)
        self.first += count
        return taken


class _Window(NamedTuple):
    """One window of a case: image (C, *patch), blending weights (size,) along each axis of the patch."""

    case: _Case
    box: CropBox
    image: Tensor
    shares: tuple[Tensor, ...]
    last: bool


class _Launched(NamedTuple):
    """Output of a pass: fields (N, K, F, C, *patch) in half precision, valid after ``done``."""

    windows: list[_Window]
    fields: Tensor
    done: torch.cuda.Event | None


def standardised(change: Change, scale: IntensityScale) -> list[Tensor]:
    """Fields of a change for blending, (N, C, *S) each: the change of the mean intensity, in std, and gain - 1.

    Both are close to 0 where little changes, independent of the unit of the intensities.
    """
    mean, std = (per_channel(values, change.offset) for values in (scale.mean, scale.std))
    more = change.gain - 1
    offset = (change.offset + mean * more) / std
    return [offset, more]


def change_images(images: Tensor, fields: Sequence[Tensor], scale: IntensityScale) -> Tensor:
    """Apply blended fields to images (N, C, *S); float32, clipped.

    Args:
        images: preprocessed intensities, float32.
        fields: fields of `standardised`, of a shape that broadcasts with ``images``; the second may be omitted where
            the gain is 1.
        scale: intensity scale of the generator.
    """
    mean, std = (per_channel(values, images) for values in (scale.mean, scale.std))
    changed = torch.addcmul(images, fields[0].float(), std)
    if len(fields) > 1:
        changed.addcmul_(fields[1].float(), images - mean)
    return scale.clip(changed, images)


def draw_noise(model: HVAE, seed: int, device: torch.device) -> list[Tensor]:
    """Draw the noise (1, channels, *S) of all codes of one image; reproducible per seed and device type."""
    return model.draw_noise(torch.Generator(device).manual_seed(seed), 1)


def _half(field: Tensor) -> Tensor:
    return field.clamp(-HALF_LIMIT, HALF_LIMIT).half()
