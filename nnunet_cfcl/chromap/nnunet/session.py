"""The maps of one prediction: their colour space, the case at hand, what failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.nnunet.features import WindowFeatures, features_to
from nnunet_cfcl.chromap.nnunet.sampling import CaseInMemory, SampledCase, sample_features
from nnunet_cfcl.chromap.nnunet.spaces import FILE, evenly, fit, load_named, load_own, weights_digest
from nnunet_cfcl.chromap.nnunet.writer import EMBEDDING, ChromapWriter, MappedCase
from nnunet_cfcl.chromap.plane_accumulator import PlaneAccumulator
from nnunet_cfcl.config import ChromapSettings, resolve_settings
from nnunet_cfcl.errors import UserError, isolated, listed, reason
from nnunet_cfcl.files.atomic import writable_folder
from nnunet_cfcl.nnunet.decoder_tap import decoder_width, plain_network
from nnunet_cfcl.nnunet.plan import settings_block
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.runs.lock import exclusive

#: Images at hand that a colour space is fitted on, for a model without one.
CASES_AT_HAND = 8


@dataclass(frozen=True)
class ChromapRequest:
    """Which maps are wanted.

    Attributes:
        fold_folder: the first fold's, ``.../fold_F``; None: unknown.
        space: file of a colour space to use; None: the model's own, or one fitted on the images at hand.
        embedding: plane coordinates too; None: by the settings.
        palette: "hsv" or "oklch"; None: by the settings.
        strict: a map that cannot be made is an error in the end; else it is only told.
    """

    fold_folder: Path | None = None
    space: Path | None = None
    embedding: bool | None = None
    palette: Any = None
    strict: bool = False


@dataclass(frozen=True)
class Input:
    """A case to map: the files of its channels, the segmentation of a cascade's first stage, where its mask goes."""

    files: Sequence[str]
    earlier: str | None
    mask: Path | None


@dataclass
class _Case:
    """The case at hand, as far as it is known: nnU-Net tells its name and properties before or after its voxels."""

    name: str = ""
    properties: Mapping[str, Any] | None = None
    coordinates: Tensor | None = None
    borders: Sequence[Sequence[int]] = ()
    failure: str = ""


@dataclass
class ChromapSession:
    """Begun when nnU-Net's predictor knows its cases, finished when the masks are there. Nothing in it raises before
    `finish`: a map that cannot be made must not cost a mask.

    Attributes:
        predictor: nnU-Net's, initialised.
        request: what is wanted.
        folder: ``OUT/chromap``.
        inputs: case -> `Input`.
        part: suffix of the summary's name, where several processes share the folder.
        failures: case -> why it has no map.
    """

    predictor: Any
    request: ChromapRequest
    folder: Path
    inputs: Mapping[str, Input]
    part: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    _case: _Case = field(default_factory=_Case)
    _writer: ChromapWriter | None = None
    _space: ColorSpace | None = None
    _settings: ChromapSettings | None = None
    _windows: WindowFeatures | None = None
    _broken: str = ""
    _seen: set[str] = field(default_factory=set)

    def prepare(self) -> bool:
        """Folder, settings and colour space, before the first case; False: no maps can be made."""
        if self._writer is None and not self._broken:
            with isolated() as errors:
                self._prepare()
            self._broken = reason(errors[0]) if errors else ""
        return not self._broken

    def describe(self, name: str, properties: Mapping[str, Any]) -> None:
        """The case at hand is this one."""
        self._case.name, self._case.properties = name, properties

    def begin_image(self) -> None:
        """nnU-Net begins to predict a case; nothing of the one before is left."""
        self._case = _Case(self._case.name, self._case.properties)

    def catching(self, shape: Sequence[int], slicers: Sequence[Any], on_device: bool) -> AbstractContextManager[None]:
        """Within the block features are kept; entered anew where nnU-Net begins again on the CPU."""
        self._windows = None
        self._try(lambda: self._begin_windows(tuple(shape), slicers, on_device))
        return features_to(self.predictor.network, self._take)

    def end_window(self) -> None:
        """nnU-Net has made all passes of a window."""
        windows = self._windows
        if windows is not None and not self._try(windows.end_window):
            self._windows = None

    def end_image(self, shape: Sequence[int]) -> None:
        """nnU-Net has predicted an image (Z, Y, X) with the first fold's weights."""
        windows, self._windows = self._windows, None
        if windows is not None:
            self._try(lambda: self._keep(windows.accumulator.coordinates(), shape))

    def submit(self) -> None:
        """Have the map of the case at hand written, or note why it has none; nothing while its name is unknown."""
        case = self._case
        if case.properties is not None:
            self._case = _Case()
            self.attempt(case.name, lambda: self._submit(case))

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do something for a case's map; where it fails, that is the case's failure."""
        with isolated() as errors:
            work()
        for error in errors:
            self.failures.setdefault(name, reason(error))

    def missing(self) -> list[str]:
        """Cases whose mask is there from an earlier run, but not their map."""
        names: list[str] = []
        self.attempt("cases of an earlier run", lambda: names.extend(
            name for name, one in self.inputs.items() if name not in self._seen and one.mask is not None
            and one.mask.is_file() and not self.has_map(name)))
        return names

    def has_map(self, name: str) -> bool:
        """Whether all files of a case are there that are wanted; the picture is written last."""
        wanted = [f"{name}.png", *([f"{name}{EMBEDDING}"] if self.request.embedding else [])]
        return all((self.folder / file).is_file() for file in wanted)

    def preprocess(self, name: str) -> tuple[NDArray[np.float32], Mapping[str, Any]]:
        """A case as nnU-Net's predictor sees it, (C, Z, Y, X), and its properties."""
        predictor, known = self.predictor, self.inputs[name]
        preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
        data, seg, properties = preprocessor.run_case(
            list(known.files), known.earlier, predictor.plans_manager, predictor.configuration_manager,
            predictor.dataset_json)
        if known.earlier is not None:
            one_hot = convert_labelmap_to_one_hot(seg[0], predictor.label_manager.foreground_labels, data.dtype)
            data = np.vstack((data, one_hot))
        return data, properties

    @property
    def mirrors(self) -> bool:
        """Whether features are averaged over nnU-Net's mirrored passes."""
        return bool(self._settings is not None and self._settings.mirroring)

    def finish(self) -> None:
        """Montages and summary; says what failed.

        Raises:
            UserError: something failed and the request is strict.
        """
        if self._writer is not None:
            self.attempt("some cases", self._writer.finish)
            if self._writer.made:
                print(f"CHRO-maps of {len(self._writer.made)} cases are in {self.folder}")
        lines = [f"no CHRO-maps: {self._broken}"] if self._broken else []
        lines += [f"no CHRO-map of {name}: {reason}" for name, reason in self.failures.items()]
        if lines and self.request.strict:
            raise UserError(listed(lines, 5))
        for line in lines:
            print(line)

    def _submit(self, case: _Case) -> None:
        self._seen.add(case.name)
        for ending in (".png", ".nii.gz", EMBEDDING):
            # an earlier run's map must not pass for this one's
            (self.folder / f"{case.name}{ending}").unlink(missing_ok=True)
        if case.coordinates is None or self._writer is None:
            if not self._broken:
                raise UserError(case.failure or "no features were caught")
            return
        known = self.inputs[case.name]
        self._writer.submit(MappedCase(
            case.name, case.coordinates, case.borders, case.properties or {}, known.files, known.mask))

    def _prepare(self) -> None:
        configuration = self.predictor.configuration_manager
        resolved = resolve_settings(settings_block(configuration))
        settings = resolved.chromap
        if self.request.embedding is not None:
            settings = replace(settings, embedding=self.request.embedding)
        network = plain_network(self.predictor.network)
        decoder_width(network)
        writable_folder(self.folder, "choose another output folder")
        space = self._find_space(network, settings, resolved.seed)
        space = replace(space, palette=self.request.palette or settings.palette)
        self._space = space.to(self.predictor.device)
        self._settings = settings
        labels = {number: name for name, number in self.predictor.dataset_json["labels"].items()
                  if isinstance(number, int)}
        self._writer = ChromapWriter(
            self.folder, space, settings, self.predictor.plans_manager, configuration, labels, self.failures, self.part)

    def _find_space(self, network: torch.nn.Module, settings: ChromapSettings, seed: int) -> ColorSpace:
        identity = weights_digest(self.predictor.list_of_parameters[0])
        if self.request.space is not None:
            return load_named(self.request.space, network, identity)
        fold = self.request.fold_folder
        own = load_own(fold / "cfcl" / FILE, identity) if fold is not None else None
        if own is not None:
            return own
        # of several processes that share the folder one fits the colours for all
        with exclusive(self.folder, print) if self.part else nullcontext():
            return load_own(self.folder / FILE, identity) or self._fit_on_images(network, settings, seed, identity)

    def _fit_on_images(
        self, network: torch.nn.Module, settings: ChromapSettings, seed: int, identity: str
    ) -> ColorSpace:
        names = evenly(list(self.inputs), CASES_AT_HAND)
        print(f"The model has no colour space of its own: it is fitted on {len(names)} of the images at hand and kept "
              f"in {self.folder / FILE}. Colours are comparable among maps of this space alone.")
        network.load_state_dict(self.predictor.list_of_parameters[0])
        features = sample_features(
            network.to(self.predictor.device), self._cases_at_hand(names), len(names),
            self.predictor.configuration_manager.patch_size, settings.samples, seed, self.predictor.device)
        space = fit(features, settings, seed, identity)
        space.save(self.folder / FILE)
        return space

    def _cases_at_hand(self, names: Sequence[str]) -> Iterator[SampledCase]:
        for name in names:
            with isolated() as errors:
                data = self.preprocess(name)[0]
            if errors:
                # nnU-Net's own prediction reports the error in full
                print(f"{name} cannot be read to fit the colour space ({reason(errors[0])})")
            else:
                yield CaseInMemory(name, data)

    def _begin_windows(self, shape: tuple[int, ...], slicers: Sequence[Any], on_device: bool) -> None:
        predictor = self.predictor
        device = predictor.device if on_device else torch.device("cpu")
        assert self._space is not None
        space = self._space.to(device)
        patch_size = tuple(predictor.configuration_manager.patch_size)
        windows = SlidingWindows(patch_size, predictor.tile_step_size)(shape)
        self._case.borders = [
            [] if axis.shares.shape[1] == 1 else [*axis.starts, *(at + axis.shares.shape[1] for at in axis.starts)]
            for axis in windows]
        axes = predictor.allowed_mirroring_axes if self.mirrors and predictor.use_mirroring else None
        self._windows = WindowFeatures(PlaneAccumulator(windows, shape, space.place, device),
                                       [one[1:] for one in slicers], self._space.reduce, axes or ())

    def _take(self, maps: Tensor) -> None:
        windows = self._windows
        if windows is not None and not self._try(lambda: windows.take(maps)):
            self._windows = None

    def _keep(self, coordinates: Tensor, shape: Sequence[int]) -> None:
        # nnU-Net pads what is smaller than the patch on both sides, the smaller half of it before
        offsets = [(padded - n) // 2 for padded, n in zip(coordinates.shape[1:], shape)]
        box = tuple(slice(start, start + n) for start, n in zip(offsets, shape))
        self._case.coordinates = coordinates[(slice(None), *box)].cpu()
        self._case.borders = [[at - start for at in places] for places, start in zip(self._case.borders, offsets)]

    def _try(self, work: Callable[[], object]) -> bool:
        """Whether it succeeds; the reason is kept until the case's name is known."""
        with isolated() as errors:
            work()
        for error in errors:
            self._case.failure = self._case.failure or reason(error)
        return not errors
