"""Cases, files and qualities in imagesUn and labelsSilver of a raw dataset, and the problems found in them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.csv_table import check_case_names, read_csv_table
from nnunet_cfcl.files.hashing import digest

POOL_IMAGES = "imagesUn"
SILVER_LABELS = "labelsSilver"
QUALITIES = "silver.csv"
# files that nnUNetv2_predict and its postprocessing write beside the labels
NO_LABELS = (".json", ".pkl", ".npz")


@dataclass(frozen=True)
class SilverSource:
    """Raw files of one silver label.

    Attributes:
        label: file of the label map, on the voxel grid of the raw image.
        probabilities: nnU-Net's ``CASE.npz`` of ``--save_probabilities``; None without one.
        quality: quality of the case in [0, 1] from ``silver.csv``; None if not given.
    """

    label: Path
    probabilities: Path | None
    quality: float | None


@dataclass(frozen=True)
class RawCase:
    """Raw files of one case to be preprocessed.

    Attributes:
        name: case identifier.
        images: one file per channel, in order; empty if the file names are already wrong.
        silver: silver label of the case; None without one.
        training: whether this is a case of imagesTr, of which only the silver label is stored.
    """

    name: str
    images: tuple[Path, ...]
    silver: SilverSource | None
    training: bool = False

    def signature(self) -> str:
        """Digest of the size and modification time of every file, and of the quality."""
        files = list(self.images)
        if self.silver is not None:
            files += [file for file in (self.silver.label, self.silver.probabilities) if file is not None]
        return digest([[_state(file) for file in files], self.silver.quality if self.silver else None])


def _state(file: Path) -> list[str | int]:
    """Name, size and modification time; of a missing file, which the check will report, only the name."""
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns] if file.exists() else [file.name]


@dataclass
class RawPool:
    """Cases and problems found in a raw dataset.

    Attributes:
        cases: all cases of the pool, and all training cases with a silver label.
        problems: messages for the user, one line each.
        known: identifiers of all cases of the pool and all training cases.
    """

    cases: list[RawCase] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: frozenset[str] = frozenset()


def find_raw_pool(raw: Path, dataset_json: Mapping[str, Any], with_silver: bool = True) -> RawPool:
    """List the pool of a raw dataset by file names and the table of qualities, without opening an image.

    Args:
        raw: ``nnUNet_raw/DatasetXXX``.
        dataset_json: content of dataset.json.
        with_silver: False ignores labelsSilver.

    Returns:
        The cases, and one problem for every file whose name, counterpart or quality is wrong.
    """
    pool, ending = RawPool(), dataset_json["file_ending"]
    images = _pool_images(raw / POOL_IMAGES, ending, pool.problems)
    training = _training_images(raw, dataset_json)
    for case in sorted(images.keys() & training.keys()):
        pool.problems.append(f"{raw / POOL_IMAGES}: case {case} is also in imagesTr, expected in only one of them")
    silver = _silver_sources(raw / SILVER_LABELS, ending, pool.problems) if with_silver else {}
    for case in sorted(silver.keys() - images.keys() - training.keys()):
        pool.problems.append(f"{silver[case].label}: no image of case {case} in {POOL_IMAGES} or imagesTr")
    pool.known = frozenset(images.keys() | training.keys())
    pool.cases = [RawCase(case, files, silver.get(case)) for case, files in sorted(images.items())]
    of_training = sorted(silver.keys() & training.keys() - images.keys())
    pool.cases += [RawCase(case, training[case], silver[case], training=True) for case in of_training]
    return pool


def pool_names(raw: Path, ending: str) -> set[str]:
    """Identifiers of the cases in imagesUn; empty without the folder."""
    return {found["case"] for path in _files(raw / POOL_IMAGES) if (found := _image_name(path.name, ending))}


def silver_names(raw: Path, ending: str) -> set[str]:
    """Identifiers of the cases in labelsSilver; empty without the folder."""
    return {path.name.removesuffix(ending) for path in _files(raw / SILVER_LABELS) if path.name.endswith(ending)}


def _files(folder: Path) -> Iterator[Path]:
    """Entries of a folder without hidden files, which operating systems leave behind."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _image_name(name: str, ending: str) -> re.Match[str] | None:
    return re.fullmatch(r"(?P<case>.+)_(?P<channel>\d{4})" + re.escape(ending), name)


def _pool_images(folder: Path, ending: str, problems: list[str]) -> dict[str, tuple[Path, ...]]:
    """Case -> files in channel order; no files if the channels are not numbered 0000, 0001, ..."""
    found: dict[str, dict[int, Path]] = {}
    for path in _files(folder):
        if match := _image_name(path.name, ending):
            found.setdefault(match["case"], {})[int(match["channel"])] = path
        # nnU-Net's reader of 3D TIFFs keeps the spacing in CASE.json
        elif path.suffix != ".json" or path.is_dir():
            problems.append(f"{path}: must be named CASE_0000{ending} (four digits: the channel)")
    images = {}
    for case, channels in found.items():
        numbered = sorted(channels) == list(range(len(channels)))
        images[case] = tuple(channels[index] for index in sorted(channels)) if numbered else ()
        if not numbered:
            missing = f"{case}_{min(set(range(len(channels))) - channels.keys()):04d}{ending}"
            problems.append(f"{folder / missing}: missing, found only the channels "
                            f"{', '.join(f'{index:04d}' for index in sorted(channels))} of case {case}")
        if case.endswith("_seg"):
            problems.append(f"{folder / case}: the name of a case must not end in _seg, as nnU-Net's label files do")
    return images


def _training_images(raw: Path, dataset_json: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    if "dataset" in dataset_json:
        # the function changes the paths in place
        named = get_filenames_of_train_images_and_targets(str(raw), copy.deepcopy(dict(dataset_json)))
        return {case: tuple(Path(image) for image in files["images"]) for case, files in named.items()}
    found: dict[str, list[Path]] = {}
    for path in _files(raw / "imagesTr"):
        if match := _image_name(path.name, dataset_json["file_ending"]):
            found.setdefault(match["case"], []).append(path)
    return {case: tuple(files) for case, files in found.items()}


def _silver_sources(folder: Path, ending: str, problems: list[str]) -> dict[str, SilverSource]:
    labels, probabilities = {}, {}
    for path in _files(folder):
        if path.name.endswith(ending):
            labels[path.name.removesuffix(ending)] = path
        elif path.suffix == ".npz":
            probabilities[path.stem] = path
        elif path.is_file() and path.suffix not in NO_LABELS and path.name != QUALITIES:
            problems.append(f"{path}: a silver label must be named CASE{ending}, with the dataset's file ending")
    for case in sorted(probabilities.keys() - labels.keys()):
        problems.append(f"{probabilities[case]}: has no label map {case}{ending} beside it; was the "
                        "prediction interrupted?")
    quality = read_qualities(folder / QUALITIES, set(labels), ending, problems)
    return {case: SilverSource(path, probabilities.get(case), quality.get(case)) for case, path in labels.items()}


def read_qualities(file: Path, cases: set[str], ending: str, problems: list[str]) -> dict[str, float]:
    """Read the columns ``case`` and ``quality`` of ``silver.csv``; empty without the file.

    Args:
        file: CSV file; other columns, rows of other cases and empty qualities are ignored.
        cases: cases that have a silver label.
        ending: file ending of the labels.
        problems: list to which a message for each wrong row is added.

    Returns:
        Case -> quality in [0, 1].
    """
    if not file.is_file():
        return {}
    try:
        header, rows = read_csv_table(file)
    except UserError as error:
        problems.append(str(error))
        return {}
    if missing := [name for name in ("case", "quality") if name not in header]:
        problems.append(f"{file}: has no column {' and no column '.join(missing)}, found "
                        f"{', '.join(header) or 'none'}")
        return {}
    named: set[str] = set()
    found: dict[str, float] = {}
    for line, cells in rows.items():
        row = dict(zip(header, cells))
        case, quality = row.get("case", ""), row.get("quality", "")
        if case in cases and (fault := _row_fault(case, quality, named)):
            problems.append(f"{file} line {line}: {fault}")
        elif case in cases and quality:
            found[case] = float(quality)
        named.add(case)
    try:
        check_case_names(named, cases, ending, str(file))
    except UserError as error:
        problems.append(str(error))
    return found


def _row_fault(case: str, quality: str, named: Collection[str]) -> str | None:
    if case in named:
        return f"case {case} has more than one row"
    try:
        is_valid = not quality or 0 <= float(quality) <= 1
    except ValueError:
        is_valid = False
    return None if is_valid else f"the quality of case {case} must be a number from 0 to 1, found '{quality}'"
