"""Store of precomputed counterfactuals, one blosc2 file per case and intervention.

The format is specified in docs/reference/counterfactual-store.md. blosc2 does not detect corrupted bytes: every file
holds a checksum of each chunk, which is verified when a process first reads the chunk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.counterfactual.store_files import COMPRESSION, layout_of, replace_together, write_slabs
from nnunet_cfcl.errors import UserError, listed, shown
from nnunet_cfcl.files.atomic import replace_atomically, write_text_atomically
from nnunet_cfcl.files.chunk_checksums import check_chunks, check_header, check_plain, damage_named, write_checksums
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.files.names import is_safe_filename

FORMAT = 1
SEPARATOR = "__"
MANIFEST = "manifest.json"
LONGEST_NAME = 100
#: Prefix of the source of generated stores, in contrast to imported ones.
GENERATED = "generator:"
#: The fix for a damaged file.
FIX = "delete it and run `nnunet_cfcl generator generate` or `nnunet_cfcl counterfactuals import` again"
# memory mapping fails on Windows; nnU-Net does not use it there either
_OPEN_OPTIONS: dict[str, Any] = {} if os.name == "nt" else {"mmap_mode": "r"}


class CounterfactualStore:
    """A folder of counterfactuals; holds no open file, so that it can be pickled for worker processes.

    Attributes:
        folder: folder of the store.
        interventions: names of the interventions, in the manifest's order.
        source: origin of the counterfactuals, free text.
        data_identifier: nnU-Net's name of the preprocessed data that the store belongs to, or "".
        preprocessing: hash or free text that identifies the preprocessing of the counterfactuals.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.interventions: tuple[str, ...] = tuple(manifest["interventions"])
        self.source: str = manifest["source"]
        self.data_identifier: str = manifest.get("data_identifier", "")
        self.preprocessing: str = manifest.get("preprocessing", "")
        self._verified: dict[str, set[int]] = {}

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        interventions: Sequence[str],
        source: str,
        data_identifier: str = "",
        preprocessing: str = "",
    ) -> CounterfactualStore:
        """Create a store, or extend an existing store of the same source by further interventions.

        Raises:
            UserError: the name of an intervention is invalid, or the folder holds a different store.
        """
        names = list(dict.fromkeys(interventions))
        for name in names:
            check_intervention_name(name)
        expected = {"format": FORMAT, "source": source, "data_identifier": data_identifier,
                    "preprocessing": preprocessing}
        path = Path(folder)
        if (path / MANIFEST).exists():
            found = _read_manifest(path)
            differing = [key for key, value in expected.items() if found.get(key) != value]
            if differing:
                key = differing[0]
                raise UserError(f"{path} already holds a counterfactual store with another {key}, found "
                                f"{found.get(key)!r}, expected {expected[key]!r}",
                                "delete it or choose another folder")
            names = list(dict.fromkeys([*found["interventions"], *names]))
        (path / "cases").mkdir(parents=True, exist_ok=True)
        manifest = {**expected, "interventions": names}
        write_text_atomically(path / MANIFEST, json.dumps(manifest, indent=2))
        return cls(path, manifest)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> CounterfactualStore:
        """Open the store in ``folder``.

        Raises:
            UserError: the folder holds no store, or its manifest is unreadable or of an unknown format.
        """
        return cls(Path(folder), _read_manifest(Path(folder)))

    def path(self, case: str, intervention: str) -> Path:
        """File of a counterfactual, which need not exist."""
        return self.folder / "cases" / f"{case}{SEPARATOR}{intervention}.b2nd"

    def write(
        self,
        case: str,
        intervention: str,
        array: NDArray[np.floating],
        chunks: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Write or replace one counterfactual; an interrupted write leaves the store unchanged.

        Args:
            case: nnU-Net's case identifier.
            intervention: name of an intervention of the store.
            array: (C, Z, Y, X) preprocessed intensities in the shape of the preprocessed case; saved as float32.
            chunks: chunk shape of the case's own file; None lets blosc2 choose.
            blocks: block shape of the case's own file.

        Raises:
            UserError: unknown intervention, or not a 4D array.
        """
        self._check_writable(case, intervention, array.shape)
        layout, whole = layout_of(chunks, blocks), np.ascontiguousarray(array, dtype=np.float32)
        replace_atomically(
            self.path(case, intervention),
            lambda file: write_checksums(
                blosc2.asarray(whole, urlpath=str(file), mode="w", cparams=COMPRESSION, **layout)),
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
        """Write several counterfactuals of a case together, a few planes at a time; none if ``slabs`` fails.

        Memory: one chunk's planes, (K, C, chunks[1], Y, X) float32.

        Args:
            case: nnU-Net's case identifier.
            interventions: names of K interventions of the store.
            shape: (C, Z, Y, X) of the preprocessed case.
            slabs: (K, C, z, Y, X) preprocessed intensities, from the first plane to the last.
            chunks, blocks: see :meth:`write`.

        Raises:
            UserError: unknown intervention, or not a 4D shape.
            ValueError: the slabs do not add up to ``shape``.
        """
        for name in interventions:
            self._check_writable(case, name, shape)
        replace_together([self.path(case, name) for name in interventions],
                         lambda files: write_slabs(files, tuple(shape), slabs, layout_of(chunks, blocks)))

    def _check_writable(self, case: str, intervention: str, shape: Sequence[int]) -> None:
        if intervention not in self.interventions:
            raise UserError(f"the store {self.folder} has the interventions {', '.join(self.interventions)}, "
                            f"found '{intervention}'")
        if len(shape) != 4:
            raise UserError(f"counterfactual '{intervention}' of case {case} must be (C, Z, Y, X), "
                            f"found shape {tuple(shape)}")

    def read(self, case: str, intervention: str, box: tuple[slice, ...] | None = None) -> NDArray[np.float32]:
        """Read a box of a counterfactual; only the blocks that overlap it are decompressed.

        Args:
            case: nnU-Net's case identifier.
            intervention: name of an intervention of the store.
            box: slices of the spatial axes (Z, Y, X); None: the whole image. All channels are read.

        Returns:
            (C, z, y, x) float32.

        Raises:
            UserError: the file is missing, unreadable or corrupted.
        """
        path, region = self.path(case, intervention), (slice(None), *(box or ()))
        with damage_named(path, FIX):
            array = self._open_array(case, intervention)
            check_chunks(array, region, self._verified.setdefault(path.name, set()))
            return np.asarray(array[region], dtype=np.float32)

    def shape(self, case: str, intervention: str) -> tuple[int, ...]:
        """Shape (C, Z, Y, X) of a counterfactual from the file's header; raises like :meth:`read`."""
        with damage_named(self.path(case, intervention), FIX):
            return tuple(self._open_array(case, intervention).shape)

    def _open_array(self, case: str, intervention: str) -> blosc2.NDArray:
        path = self.path(case, intervention)
        if not path.is_file():
            raise UserError(f"the counterfactual '{intervention}' of case {case} is missing, expected {path}")
        check_plain(path)
        array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **_OPEN_OPTIONS)
        if not isinstance(array, blosc2.NDArray):
            raise ValueError(f"expected an array, found a {type(array).__name__}")
        check_header(array)
        return array

    def check(self, cases: Mapping[str, tuple[int, ...]], known: Iterable[str] = ()) -> None:
        """Check that every case has every intervention in its own shape, and that there are no unknown files.

        Args:
            cases: shape (C, Z, Y, X) of the preprocessed data of every case that needs counterfactuals.
            known: further cases of the dataset, which may have counterfactuals.

        Raises:
            UserError: files are missing, have another shape or belong to unknown cases; lists the first ones.
        """
        present = {path.name for path in (self.folder / "cases").glob("*.b2nd")}
        allowed = {self.path(case, name).name for case in {*cases, *known} for name in self.interventions}
        if unknown := sorted(present - allowed):
            raise UserError(f"{self.folder / 'cases'} holds {len(unknown)} files of cases not in the dataset or "
                            f"interventions not in the manifest: {listed(unknown)}", "delete or rename these files")
        needed = {self.path(case, name).name: (case, name) for case in cases for name in self.interventions}
        if missing := sorted(needed.keys() - present):
            raise UserError(
                f"{self.folder / 'cases'} lacks {len(missing)} of {len(needed)} files: {listed(missing)}; every "
                "pretraining case, of the pool too, needs every intervention",
                "import the missing files with nnunet_cfcl counterfactuals import, or set pretrain.data to training "
                "(without the pool) or counterfactual.source to acquisition")
        for name, (case, intervention) in needed.items():
            found, expected = self.shape(case, intervention), tuple(cases[case])
            if found != expected:
                raise UserError(f"{self.folder / 'cases' / name} has shape {found}, expected {expected}, the shape of "
                                f"the preprocessed case {case}", "create it again with the current preprocessing")


def split_name(stem: str) -> tuple[str, str]:
    """Split ``CASE__INTERVENTION`` into (case, intervention) at the last double underscore.

    Raises:
        UserError: there is no double underscore, or one of the parts is empty.
    """
    case, _, intervention = stem.rpartition(SEPARATOR)
    if not case or not intervention:
        raise UserError(f"expected a name CASE{SEPARATOR}INTERVENTION, found '{stem}'", "rename the file")
    return case, intervention


def default_store_root(preprocessed_folder: str | os.PathLike[str]) -> Path:
    """Folder of a dataset's stores: <data_identifier>_cfcl_cf beside nnUNet_preprocessed/DATASET/<data_identifier>."""
    folder = Path(preprocessed_folder)
    return folder.with_name(f"{folder.name}_cfcl_cf")


def find_store(preprocessed_folder: str | os.PathLike[str]) -> Path | None:
    """Find the imported store of a dataset's preprocessed data; None without one. Generated stores are ignored.

    Raises:
        UserError: there are several stores, or a manifest cannot be read.
    """
    folders = sorted(path.parent for path in default_store_root(preprocessed_folder).glob(f"*/{MANIFEST}"))
    stores = [folder for folder in folders if not CounterfactualStore.open(folder).source.startswith(GENERATED)]
    if len(stores) > 1:
        raise UserError(f"found {len(stores)} counterfactual stores, expected one: {listed(stores)}",
                        "set counterfactual.store to one of them, or delete the others")
    return stores[0] if stores else None


def check_intervention_name(name: str) -> None:
    """Check that the name of an intervention can be part of a file name.

    Raises:
        UserError: the name is too long or contains reserved characters.
    """
    if len(name) > LONGEST_NAME:
        raise UserError(f"the name of an intervention is part of a file name and may have at most {LONGEST_NAME} "
                        f"characters, found '{name}'", "list the interventions in counterfactual.interventions")
    if SEPARATOR in name or name != name.strip("_") or not is_safe_filename(name):
        raise UserError(f"the name of an intervention is part of a file name and must not contain '{SEPARATOR}', "
                        f"slashes, control characters or outer underscores, found '{name}'", "rename it")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except OSError as error:
        raise UserError(f"{folder} is not a counterfactual store: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", "delete the store and create it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise UserError(f"{path}: expected format {FORMAT} of the counterfactual store, found {shown(found)}")
    names = manifest.get("interventions")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} must list the names of the interventions under 'interventions', found {shown(names)}")
    if not isinstance(manifest.get("source"), str):
        raise UserError(f"{path} must name the 'source' of the counterfactuals, found {shown(manifest.get('source'))}")
    try:
        for name in names:
            check_intervention_name(name)
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.fix) from error
    return manifest
