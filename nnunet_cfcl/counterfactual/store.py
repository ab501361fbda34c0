"""Precomputed counterfactuals on disk, one blosc2 file per case and intervention.

The format is written down in docs/reference/counterfactual-store.md. blosc2 does not notice a changed byte: every file
carries a checksum of each of its chunks, which is looked at when a process first reads the chunk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.errors import UserError, listed, shown
from nnunet_cfcl.files.atomic import replace_atomically, write_text_atomically
from nnunet_cfcl.files.chunk_checksums import check_chunks, check_header, check_plain, damage_named, write_checksums
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.files.names import is_safe_filename

FORMAT = 1
SEPARATOR = "__"
MANIFEST = "manifest.json"
LONGEST_NAME = 100
#: The source of stores that a generator of ours filled begins with it: nobody brought them in.
GENERATED = "generator:"
#: What makes a damaged file again.
FIX = "delete it and make it again: nnunet_cfcl generator generate, or counterfactuals import"
_COMPRESSION = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}
# memory mapping fails on Windows, where nnU-Net does without it too
_OPEN_OPTIONS: dict[str, Any] = {} if os.name == "nt" else {"mmap_mode": "r"}


class CounterfactualStore:
    """A folder of counterfactuals; holds no open file, so it can be pickled and used in worker processes.

    Attributes:
        folder: the store.
        interventions: names of the interventions, in the manifest's order.
        source: what made the counterfactuals, free text.
        data_identifier: nnU-Net's name of the preprocessed data they belong to, or "".
        preprocessing: hash or free text that identifies the preprocessing they went through.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.interventions: tuple[str, ...] = tuple(manifest["interventions"])
        self.source: str = manifest["source"]
        self.data_identifier: str = manifest.get("data_identifier", "")
        self.preprocessing: str = manifest.get("preprocessing", "")
        self._sound: dict[str, set[int]] = {}

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        interventions: Sequence[str],
        source: str,
        data_identifier: str = "",
        preprocessing: str = "",
    ) -> CounterfactualStore:
        """A new store, or the one that is there if its manifest says the same but for further interventions.

        Raises:
            UserError: an invalid name of an intervention, or a store of something else in this folder.
        """
        names = list(dict.fromkeys(interventions))
        for name in names:
            check_intervention_name(name)
        wanted = {"format": FORMAT, "source": source, "data_identifier": data_identifier,
                  "preprocessing": preprocessing}
        path = Path(folder)
        if (path / MANIFEST).exists():
            found = _read_manifest(path)
            differing = [key for key, value in wanted.items() if found.get(key) != value]
            if differing:
                key = differing[0]
                raise UserError(f"{path} already holds a counterfactual store with another {key} ({found.get(key)!r}, "
                                f"not {wanted[key]!r})", "delete it or choose another folder")
            names = list(dict.fromkeys([*found["interventions"], *names]))
        (path / "cases").mkdir(parents=True, exist_ok=True)
        manifest = {**wanted, "interventions": names}
        write_text_atomically(path / MANIFEST, json.dumps(manifest, indent=2))
        return cls(path, manifest)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> CounterfactualStore:
        """The store in ``folder``.

        Raises:
            UserError: no store there, an unreadable manifest or an unknown format.
        """
        return cls(Path(folder), _read_manifest(Path(folder)))

    def path(self, case: str, intervention: str) -> Path:
        """The file of a counterfactual, there or not."""
        return self.folder / "cases" / f"{case}{SEPARATOR}{intervention}.b2nd"

    def write(
        self,
        case: str,
        intervention: str,
        array: NDArray[np.floating],
        chunks: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Write (or replace) one counterfactual; an interrupted write leaves the store as it was.

        Args:
            case: nnU-Net's case identifier.
            intervention: one of the store's.
            array: (C, Z, Y, X) preprocessed intensities, the shape of the case's preprocessed data; saved as float32.
            chunks: chunk shape of the case's own file; None lets blosc2 choose.
            blocks: block shape of the case's own file.

        Raises:
            UserError: not an intervention of this store, or not a 4D array.
        """
        self._check_writable(case, intervention, array.shape)
        layout, whole = _layout(chunks, blocks), np.ascontiguousarray(array, dtype=np.float32)
        replace_atomically(
            self.path(case, intervention),
            lambda file: write_checksums(
                blosc2.asarray(whole, urlpath=str(file), mode="w", cparams=_COMPRESSION, **layout)),
        )

    def write_slabs(
        self,
        case: str,
        interventions: Sequence[str],
        shape: Sequence[int],
        slabs: Iterable[NDArray[np.floating]],
        chunks: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Write several counterfactuals of a case together, a few planes at a time; none where ``slabs`` fails.

        Memory is that of one chunk's planes, (K, C, chunks[1], Y, X) float32.

        Args:
            case: nnU-Net's case identifier.
            interventions: K of the store's.
            shape: (C, Z, Y, X) of the case's preprocessed data.
            slabs: (K, C, z, Y, X) preprocessed intensities, from the first plane to the last.
            chunks, blocks: see :meth:`write`.

        Raises:
            UserError: not an intervention of this store, or not a 4D shape.
            ValueError: the slabs do not add up to ``shape``.
        """
        for name in interventions:
            self._check_writable(case, name, shape)
        layout = _layout(chunks, blocks)
        _replace_together(
            [self.path(case, name) for name in interventions], lambda files: _fill(files, tuple(shape), slabs, layout))

    def _check_writable(self, case: str, intervention: str, shape: Sequence[int]) -> None:
        if intervention not in self.interventions:
            raise UserError(f"the store {self.folder} has the interventions {', '.join(self.interventions)}",
                            f"found '{intervention}'")
        if len(shape) != 4:
            raise UserError(f"counterfactual '{intervention}' of case {case} must be (C, Z, Y, X), "
                            f"found shape {tuple(shape)}")

    def read(self, case: str, intervention: str, box: tuple[slice, ...] | None = None) -> NDArray[np.float32]:
        """A box of a counterfactual; only the blocks that it touches are read.

        Args:
            case: nnU-Net's case identifier.
            intervention: one of the store's.
            box: slices of the spatial axes (Z, Y, X); None: the whole image. All channels are read.

        Returns:
            (C, z, y, x) float32.

        Raises:
            UserError: the file is missing, cannot be read, or is not as it was written.
        """
        path, region = self.path(case, intervention), (slice(None), *(box or ()))
        with damage_named(path, FIX):
            array = self._open_array(case, intervention)
            check_chunks(array, region, self._sound.setdefault(path.name, set()))
            return np.asarray(array[region], dtype=np.float32)

    def shape(self, case: str, intervention: str) -> tuple[int, ...]:
        """(C, Z, Y, X) of a counterfactual, from the file's header; raises as :meth:`read` does."""
        with damage_named(self.path(case, intervention), FIX):
            return tuple(self._open_array(case, intervention).shape)

    def _open_array(self, case: str, intervention: str) -> blosc2.NDArray:
        path = self.path(case, intervention)
        if not path.is_file():
            raise UserError(f"the counterfactual '{intervention}' of case {case} is missing: no file {path}")
        check_plain(path)
        array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **_OPEN_OPTIONS)
        if not isinstance(array, blosc2.NDArray):
            raise ValueError(f"it holds a {type(array).__name__}, no array")
        check_header(array)
        return array

    def check(self, cases: Mapping[str, tuple[int, ...]], known: Iterable[str] = ()) -> None:
        """Make sure that every case has every intervention in its own shape, and nothing foreign is there.

        Args:
            cases: shape (C, Z, Y, X) of the preprocessed data of every case that needs counterfactuals.
            known: further cases of the dataset, whose counterfactuals may be there or not.

        Raises:
            UserError: names the first files that are missing, of another shape or of an unknown case.
        """
        present = {path.name for path in (self.folder / "cases").glob("*.b2nd")}
        allowed = {self.path(case, name).name for case in {*cases, *known} for name in self.interventions}
        if unknown := sorted(present - allowed):
            raise UserError(f"{self.folder / 'cases'} holds {len(unknown)} files of cases not in the dataset or "
                            f"interventions not in the manifest: {listed(unknown)}", "delete or rename them")
        wanted = {self.path(case, name).name: (case, name) for case in cases for name in self.interventions}
        if missing := sorted(wanted.keys() - present):
            raise UserError(f"{self.folder / 'cases'} lacks {len(missing)} of {len(wanted)} files: {listed(missing)}",
                            "every case of the pretraining, those of the pool included, needs every intervention: "
                            "bring in the missing ones with nnunet_cfcl counterfactuals import, or set pretrain.data "
                            "to training (the pool is left out), or counterfactual.source to acquisition")
        for name, (case, intervention) in wanted.items():
            found, expected = self.shape(case, intervention), tuple(cases[case])
            if found != expected:
                raise UserError(f"{self.folder / 'cases' / name} has shape {found}, expected {expected} as the "
                                f"preprocessed case {case}", "make it again with the current preprocessing")


def split_name(stem: str) -> tuple[str, str]:
    """(case, intervention) of ``CASE__INTERVENTION``, split at the last double underscore.

    Raises:
        UserError: there is none, or one of the two parts is empty.
    """
    case, _, intervention = stem.rpartition(SEPARATOR)
    if not case or not intervention:
        raise UserError(f"'{stem}' must be named CASE{SEPARATOR}INTERVENTION")
    return case, intervention


def default_store_root(preprocessed_folder: str | os.PathLike[str]) -> Path:
    """Folder of the stores of nnUNet_preprocessed/DATASET/<data_identifier>: its sibling <data_identifier>_cfcl_cf."""
    folder = Path(preprocessed_folder)
    return folder.with_name(f"{folder.name}_cfcl_cf")


def find_store(preprocessed_folder: str | os.PathLike[str]) -> Path | None:
    """The store that was brought in for a dataset's preprocessed data, None without one; those that a generator filled
    do not count.

    Raises:
        UserError: there are several, and setting ``counterfactual.store`` must name one; a manifest cannot be read.
    """
    folders = sorted(path.parent for path in default_store_root(preprocessed_folder).glob(f"*/{MANIFEST}"))
    stores = [folder for folder in folders if not CounterfactualStore.open(folder).source.startswith(GENERATED)]
    if len(stores) > 1:
        raise UserError(f"there are {len(stores)} counterfactual stores: {listed(stores)}",
                        "name one in the setting counterfactual.store, or delete those out of date")
    return stores[0] if stores else None


def _layout(chunks: Sequence[int] | None, blocks: Sequence[int] | None) -> dict[str, Any]:
    return {"chunks": tuple(chunks) if chunks else None, "blocks": tuple(blocks) if blocks else None}


def _replace_together(
    files: Sequence[Path], write: Callable[[Sequence[Path]], None], opened: tuple[Path, ...] = ()
) -> None:
    """`replace_atomically` of several files that one function writes."""
    if len(opened) == len(files):
        write(opened)
    else:
        replace_atomically(
            files[len(opened)], lambda temporary: _replace_together(files, write, (*opened, temporary)))


def _fill(
    files: Sequence[Path], shape: tuple[int, ...], slabs: Iterable[NDArray[np.floating]], layout: Mapping[str, Any]
) -> None:
    arrays = [blosc2.empty(shape, np.float32, urlpath=str(file), mode="w", cparams=_COMPRESSION, **layout)
              for file in files]
    done = 0
    # whole chunks: one that is written again is compressed again
    for slab in _regrouped(slabs, arrays[0].chunks[1]):
        planes = slice(done, done + slab.shape[2])
        if slab.shape != (len(files), shape[0], planes.stop - done, *shape[2:]) or planes.stop > shape[1]:
            raise ValueError(f"a slab of shape {slab.shape} at plane {done} does not fit {len(files)} images {shape}")
        for array, part in zip(arrays, slab, strict=True):
            array[:, planes] = np.ascontiguousarray(part)
        done = planes.stop
    if done != shape[1]:
        raise ValueError(f"the slabs have {done} planes, expected {shape[1]}")
    for array in arrays:
        write_checksums(array)


def _regrouped(slabs: Iterable[NDArray[np.floating]], depth: int) -> Iterator[NDArray[np.float32]]:
    """The same planes (axis 2), ``depth`` at a time, the last ones fewer; in one buffer, to be used before the next."""
    buffer, filled = np.empty(0, np.float32), 0
    for slab in slabs:
        if not buffer.size:
            buffer = np.empty((*slab.shape[:2], depth, *slab.shape[3:]), np.float32)
        while slab.shape[2]:
            part = slab[:, :, : depth - filled]
            buffer[:, :, filled : filled + part.shape[2]] = part
            filled, slab = filled + part.shape[2], slab[:, :, part.shape[2] :]
            if filled == depth:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:, :, :filled]


def check_intervention_name(name: str) -> None:
    """Refuse what cannot be part of a file's name.

    Raises:
        UserError: says what is wrong with it.
    """
    if len(name) > LONGEST_NAME:
        raise UserError(f"an intervention's name is part of a file name and must not be longer than {LONGEST_NAME} "
                        f"characters, found '{name}'", "name those you want in counterfactual.interventions")
    if SEPARATOR in name or name != name.strip("_") or not is_safe_filename(name):
        raise UserError(f"an intervention's name is part of a file name and must not contain '{SEPARATOR}', slashes, "
                        f"control characters or outer underscores, found '{name}'")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except OSError as error:
        raise UserError(f"{folder} is not a counterfactual store: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise UserError(f"{path} must be of counterfactual store format {FORMAT}, found {shown(found)}")
    names = manifest.get("interventions")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} must list the names of the interventions under 'interventions', found {shown(names)}")
    if not isinstance(manifest.get("source"), str):
        raise UserError(f"{path} must name the 'source' of the counterfactuals, found {shown(manifest.get('source'))}")
    try:
        for name in names:
            check_intervention_name(name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return manifest
