"""Counterfactuals of images of any size: what the generator changes in overlapping windows is blended.

An intervention is a field over the image (method, section 1), and fields alone are blended: the detail of the image
itself is never averaged. A case is worked off along its first axis: its planes are done, and forgotten, as soon as no
further window touches them, so that neither the case nor its counterfactuals are ever in memory as a whole.
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

#: Fields are bounded so before they go into half precision, whose largest number is 65504.
HALF_LIMIT = 6e4
#: So many planes of a case are handed over at once.
PLANES = 16


@dataclass(frozen=True)
class CaseChange:
    """Interventions on one case.

    Attributes:
        case: its name.
        parents: (P,) its encoded attributes.
        others: (K, P) those after each of the K interventions.
        noise_seed: of the sample of the posterior, the same in all windows, so that they agree where they overlap;
            None: the posterior's mean.
    """

    case: str
    parents: Tensor
    others: Tensor
    noise_seed: int | None = None


class Slab(NamedTuple):
    """The next planes of a case's counterfactuals: images (K, C, z, Y, X) float32 on the CPU, intensities as nnU-Net's
    preprocessing leaves them."""

    case: str
    images: Tensor


class SlidingWindowCounterfactuals:
    """Makes the counterfactuals of whole cases.

    Memory: on the device that of one pass of the generator, and of the fields it gave; on the CPU, for K interventions
    and a patch of z planes, 2 K C z Y X bytes (twice that with a learned scale) and the windows of two passes.

    Args:
        generator: of the changes.
        reader: of the cases.
        windows: for the generator's patch.
        patches_per_pass: windows that the generator may take at once, of one case or of several; it takes the largest
            power of two of them, the last ones filled up, so that a case's counterfactuals do not depend, on a CPU, on
            the cases that are worked on with it.
        zero_is_outside: voxels with zeros in all channels are outside of the mask in which the image was normalised,
            and stay zero.
    """

    def __init__(
        self, generator: CounterfactualGenerator, reader: CaseReader, windows: Windows, patches_per_pass: int,
        zero_is_outside: bool,
    ) -> None:
        self.generator, self.reader, self._windows = generator, reader, windows
        # A CPU adds up in an order that depends on the size of a pass and, unless that is a power of two, on the place
        # in it: a window would come out otherwise in its last digits among the cases that are left after a kill.
        self._per_pass, self._zero_is_outside = 1 << (patches_per_pass.bit_length() - 1), zero_is_outside
        self._scale = generator.scale.to(torch.device("cpu"))
        self._fields = 2 if generator.learned_scale else 1

    def slabs(self, cases: Iterable[CaseChange]) -> Iterator[Slab]:
        """All planes of all cases, in order; every case has the same number of interventions.

        Raises:
            UserError: a case, or what the generator makes of it, is not finite.
        """
        windows = chain.from_iterable(map(self._windows_of, cases))
        before = None
        while batch := list(islice(windows, self._per_pass)):
            # a GPU works on this pass while the last one is added up here and the next one is read
            launched = self._launch(batch)
            if before is not None:
                yield from self._collect(before)
            before = launched
        if before is not None:
            yield from self._collect(before)

    def _windows_of(self, asked: CaseChange) -> Iterator[_Window]:
        shape = tuple(self.reader.shape(asked.case))
        axes = self._windows(shape[1:])
        case = _Case(asked, shape, axes[0].shares.shape[1], self._fields)
        if asked.noise_seed is not None:
            case.noise = draw_noise(self.generator.model, asked.noise_seed, torch.device("cpu"))
        size, dim = tuple(axis.shares.shape[1] for axis in axes), len(self.generator.patch_size)
        places = list(product(*(range(len(axis.starts)) for axis in axes)))
        for place in places:
            start = tuple(axis.starts[index] for axis, index in zip(axes, place))
            box = CropBox(start, size, shape[1:], dim)
            part = self.reader.read(asked.case, box.inside)
            require_finite(part, f"case '{asked.case}'", box.inside)
            last = place == places[-1]
            # of what is outside nothing is kept; the last window ends the case
            if last or not self._zero_is_outside or part.any():
                shares = tuple(axis.shares[index] for axis, index in zip(axes, place))[-dim:]
                yield _Window(case, box, box.extend(part), shares, last)

    def _launch(self, windows: list[_Window]) -> _Launched:
        """Starts a pass; what comes of it may still be on its way from the device."""
        filled = windows + windows[-1:] * (self._per_pass - len(windows))
        asked = [window.case.asked for window in filled]
        device, interventions = self.generator.device, len(asked[0].others)
        noise = None
        if windows[0].case.noise is not None:
            codes = zip(*(window.case.noise or () for window in filled), strict=True)
            noise = [torch.cat(code).to(device) for code in codes]
        changes = self.generator.changes(
            torch.stack([window.image for window in filled]), torch.stack([one.parents for one in asked]),
            [torch.stack([one.others[k] for one in asked]) for k in range(interventions)], noise)
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
        """Adds the fields of a pass to their cases; the planes that are done by it."""
        if launched.done is not None:
            launched.done.synchronize()
        for window, fields in zip(launched.windows, launched.fields, strict=True):
            yield from self._slabs(window.case, max(0, window.box.start[0]))
            window.case.add(window.box, fields)
            if window.last:
                yield from self._slabs(window.case, window.case.shape[1])

    def _slabs(self, case: _Case, end: int) -> Iterator[Slab]:
        """The planes that come before plane ``end``."""
        while case.first < end:
            first = case.first
            for fields in case.take(end - first).split(PLANES, 3):
                yield Slab(case.asked.case, self._changed(case, first, fields))
                first += fields.shape[3]

    def _changed(self, case: _Case, first: int, fields: Tensor) -> Tensor:
        """The counterfactuals (K, C, z, Y, X) from plane ``first`` on."""
        box = (slice(first, first + fields.shape[3]), *(slice(0, n) for n in case.shape[2:]))
        images = torch.from_numpy(self.reader.read(case.asked.case, box))[None]
        changed = change_images(images, fields.unbind(1), self._scale)
        if not changed.isfinite().all():
            raise UserError(f"the generator gives intensities that are not finite for case '{case.asked.case}'",
                            "train it again, with a lower generator.initial_lr")
        if self._zero_is_outside:
            changed.masked_fill_((images == 0).all(1, keepdim=True), 0)
        return changed


class _Case:
    """A case at work: the fields of those of its planes that windows still add to.

    Args:
        asked: interventions on it.
        shape: (C, Z, Y, X).
        depth: planes of a window.
        fields: that are blended for every intervention.
    """

    def __init__(self, asked: CaseChange, shape: tuple[int, ...], depth: int, fields: int) -> None:
        self.asked, self.shape, self.first = asked, shape, 0
        self.noise: list[Tensor] | None = None
        self._size = (len(asked.others), fields, shape[0], min(depth, shape[1]), *shape[2:])

    @cached_property
    def _sums(self) -> Tensor:
        # not before the first window is done: the windows of the next case are read while this one is at work
        return torch.zeros(self._size, dtype=torch.float16)

    def add(self, box: CropBox, fields: Tensor) -> None:
        """What one window says: (K, F, C, *patch), weighted, in half precision."""
        low, high = box.valid_range
        inside: tuple[Any, ...] = (..., *(slice(*ends) for ends in zip(low, high, strict=True)))
        planes, *plane = box.inside
        there: tuple[Any, ...] = (..., slice(planes.start - self.first, planes.stop - self.first), *plane)
        self._sums[there] += fields[inside] if box.dim == 3 else fields[inside].unsqueeze(3)

    def take(self, count: int) -> Tensor:
        """The fields (K, F, C, z, Y, X) of the next planes, at most ``count`` of them; they are forgotten here."""
        count = min(count, self._size[3])
        taken = self._sums[:, :, :, :count].clone()
        forget_planes(self._sums, 3, count)
        self.first += count
        return taken


class _Window(NamedTuple):
    """One window of a case: image (C, *patch), shares (size,) along each of the patch's axes."""

    case: _Case
    box: CropBox
    image: Tensor
    shares: tuple[Tensor, ...]
    last: bool


class _Launched(NamedTuple):
    """What comes out of a pass: fields (N, K, F, C, *patch) in half precision, there once ``done`` has happened."""

    windows: list[_Window]
    fields: Tensor
    done: torch.cuda.Event | None


def standardised(change: Change, scale: IntensityScale) -> list[Tensor]:
    """The fields of a change that are blended, (N, C, *S) each, small where little is changed, whatever the unit of the
    intensities: the offset at the centre of the intensities, in spreads, and the gain less 1."""
    centre, spread = (per_channel(values, change.offset) for values in (scale.centre, scale.spread))
    more = change.gain - 1
    offset = (change.offset + centre * more) / spread
    return [offset, more]


def change_images(images: Tensor, fields: Sequence[Tensor], scale: IntensityScale) -> Tensor:
    """Counterfactuals of images (N, C, *S) from blended fields of the same shape, or one that N stretches to; float32.

    Args:
        images: preprocessed intensities, float32.
        fields: as `standardised` gives them; the gain may be left out where it is 1.
        scale: of the generator, which also bounds the counterfactuals.
    """
    centre, spread = (per_channel(values, images) for values in (scale.centre, scale.spread))
    changed = torch.addcmul(images, fields[0].float(), spread)
    if len(fields) > 1:
        changed.addcmul_(fields[1].float(), images - centre)
    return scale.clip(changed, images)


def draw_noise(model: HVAE, seed: int, device: torch.device) -> list[Tensor]:
    """The noise (1, channels, *S) of all codes of one image; the same for the same seed and kind of device."""
    return model.draw_noise(torch.Generator(device).manual_seed(seed), 1)


def _half(field: Tensor) -> Tensor:
    return field.clamp(-HALF_LIMIT, HALF_LIMIT).half()
