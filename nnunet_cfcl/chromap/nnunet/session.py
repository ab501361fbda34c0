"""Session: the maps of one prediction, their colour space, the current case and the failures."""

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

#: Images that a colour space is fitted on, for a model without one.
CASES_AT_HAND = 8


@dataclass(frozen=True)
class ChromapRequest:
    """Request for maps.

    Attributes:
        fold_folder: folder of the first fold, ``.../fold_F``; None: unknown.
        space: file of the colour space; None: the model's own, or one fitted on the images to predict.
        embedding: whether plane coordinates are written too; None: as in the settings.
        palette: "hsv" or "oklch"; None: as in the settings.
        strict: whether a map that cannot be written is an error in the end; else it is only reported.
    """

    fold_folder: Path | None = None
    space: Path | None = None
    embedding: bool | None = None
    palette: Any = None
    strict: bool = False


@dataclass(frozen=True)
class Input:
    """Case to map: files of its channels, segmentation of a cascade's first stage, file of its mask."""

    files: Sequence[str]
    earlier: str | None
    mask: Path | None


@dataclass
class _Case:
    """Current case, as far as it is known: name and properties come before or after its voxels."""

    name: str = ""
    properties: Mapping[str, Any] | None = None
    coordinates: Tensor | None = None
    borders: Sequence[Sequence[int]] = ()
    failure: str = ""


@dataclass
class ChromapSession:
    """Session from the time when nnU-Net's predictor knows its cases until all masks are written.

    Nothing in it raises before `finish`: masks do not depend on maps.

    Attributes:
        predictor: nnU-Net's predictor, initialised.
        request: the maps to write.
        folder: ``OUT/chromap``.
        inputs: case -> `Input`.
        part: suffix of the summary's name, where several processes share the folder.
        failures: case -> reason why it has no map.
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
        """Prepare folder, settings and colour space before the first case; False: no maps can be written."""
        if self._writer is None and not self._broken:
            with isolated() as errors:
                self._prepare()
            self._broken = reason(errors[0]) if errors else ""
        return not self._broken

    def describe(self, name: str, properties: Mapping[str, Any]) -> None:
        """Set name and properties of the current case."""
        self._case.name, self._case.properties = name, properties

    def begin_image(self) -> None:
        """Begin a case; nothing of the previous one is kept."""
        self._case = _Case(self._case.name, self._case.properties)

    def catching(self, shape: Sequence[int], slicers: Sequence[Any], on_device: bool) -> AbstractContextManager[None]:
        """Context in which features are kept; entered again where nnU-Net begins again on the CPU."""
        self._windows = None
        self._try(lambda: self._begin_windows(tuple(shape), slicers, on_device))
        return features_to(self.predictor.network, self._take)

    def end_window(self) -> None:
        """End a window, after all its passes."""
        windows = self._windows
        if windows is not None and not self._try(windows.end_window):
            self._windows = None

    def end_image(self, shape: Sequence[int]) -> None:
        """End an image (Z, Y, X) that was predicted with the first fold's weights."""
        windows, self._windows = self._windows, None
        if windows is not None:
            self._try(lambda: self._keep(windows.accumulator.coordinates(), shape))

    def submit(self) -> None:
        """Write the map of the current case, or note why it has none; nothing while its name is unknown."""
        case = self._case
        if case.properties is not None:
            self._case = _Case()
            self.attempt(case.name, lambda: self._submit(case))

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do work for a case's map; an error is noted as the failure of the case."""
        with isolated() as errors:
            work()
        for error in errors:
            self.failures.setdefault(name, reason(error))

    def missing(self) -> list[str]:
        """Cases whose mask exists from an earlier run, but not their map."""
        names: list[str] = []
        self.attempt("cases of an earlier run", lambda: names.extend(
            name for name, one in self.inputs.items() if name not in self._seen and one.mask is not None
            and one.mask.is_file() and not self.has_map(name)))
        return names

    def has_map(self, name: str) -> bool:
        """Whether all requested files of a case exist; the picture is written last."""
        wanted = [f"{name}.png", *([f"{name}{EMBEDDING}"] if self.request.embedding else [])]
        return all((self.folder / file).is_file() for file in wanted)

    def preprocess(self, name: str) -> tuple[NDArray[np.float32], Mapping[str, Any]]:
        """Preprocess a case as nnU-Net's predictor does: (C, Z, Y, X) and its properties."""
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
        """Write montages and summary, and report the failures.

        Raises:
            UserError: a map failed and the request is strict.
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
            # a map of an earlier run must not be taken for this run's
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
        # one of several processes that share the folder fits the colour space for all
        with exclusive(self.folder, print) if self.part else nullcontext():
            return load_own(self.folder / FILE, identity) or self._fit_on_images(network, settings, seed, identity)

    def _fit_on_images(
        self, network: torch.nn.Module, settings: ChromapSettings, seed: int, identity: str
    ) -> ColorSpace:
        names = evenly(list(self.inputs), CASES_AT_HAND)
        print(f"The model has no colour space of its own: one is fitted on {len(names)} of the images and kept in "
              f"{self.folder / FILE}. Colours are comparable only between maps of this space.")
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
        """Whether the work succeeds; the reason of a failure is kept until the case's name is known."""
        with isolated() as errors:
            work()
        for error in errors:
            self._case.failure = self._case.failure or reason(error)
        return not errors
