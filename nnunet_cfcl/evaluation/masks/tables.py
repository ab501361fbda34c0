"""Input of an evaluation: folders of masks, the labels to evaluate, and the attributes of the cases."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from nnunet_cfcl.data.attribute_table import ATTRIBUTES, CASE, PATIENT
from nnunet_cfcl.data.attributes import is_missing
from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.evaluation.masks.metrics import METRICS
from nnunet_cfcl.files.csv_table import check_case_names, read_csv_table
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.nnunet.label_files import READERS, case_of

UNKNOWN, ALL = "unknown", "all"
#: Most values of a column to group by; more are ages, dates or free text.
MOST_GROUPS = 20
#: Separator of columns and of values in a grouping by several columns.
CROSS = " x "


@dataclass(frozen=True)
class MaskFolder:
    """Folder of masks with a name.

    Attributes:
        name: name of the method, or "truth".
        folder: folder of the files.
        files: case -> file.
    """

    name: str
    folder: Path
    files: Mapping[str, Path]


def read_folder(folder: Path, name: str) -> MaskFolder:
    """List the masks in a folder by case; files of other types, such as ``.npz``, are ignored.

    Raises:
        UserError: the folder does not exist, has no masks, or has two files of one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, expected a folder of masks ({listed(READERS)})",
                        "correct the path")
    found = sorted((case, path) for path in folder.iterdir()
                   if path.is_file() and (case := case_of(path.name)) is not None)
    if not found:
        raise UserError(f"{folder} has no masks, expected files of type {listed(READERS)}",
                        "name the folder that contains them")
    if twice := [case for case, count in Counter(case for case, _ in found).items() if count > 1]:
        raise UserError(f"{folder} has more than one file for {len(twice)} cases: {listed(twice)}",
                        "keep one file per case")
    return MaskFolder(name, folder, dict(found))


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """Parse ``NAME=FOLDER``, or ``FOLDER``, whose last part becomes the name of the method.

    Raises:
        UserError: a name is not a valid file name, or two names are the same but for their case.
    """
    named = [_named_folder(text) for text in texts]
    if twice := [name for name, count in Counter(name.casefold() for name, _ in named).items() if count > 1]:
        raise UserError(f"two folders are named {twice[0]}, expected unique names",
                        f"give them names, as in --against other={named[-1][1]}")
    return dict(named)


def _named_folder(text: str) -> tuple[str, Path]:
    before, equals, after = text.partition("=")
    # a path may contain an equals sign itself
    is_named = bool(equals and after) and not Path(text).is_dir()
    name, folder = (before, Path(after)) if is_named else (Path(text).resolve().name, Path(text))
    # the name becomes part of a file name, which must not leave its folder
    if not re.fullmatch(r"\w[\w .+()-]*", name):
        raise UserError(f"'{name}', from {text}, is not a valid name of a method, expected letters, digits, spaces and "
                        ". _ + - ( )", "write NAME=FOLDER")
    return name, folder


@dataclass(frozen=True)
class LabelScheme:
    """Labels to evaluate.

    Attributes:
        names: label -> name in dataset.json, for messages; None: all labels in the masks except 0.
        ignore: label of voxels without ground truth.
        source: the dataset.json, or None.
        regions: whether dataset.json defines regions; their plain labels are evaluated instead.
    """

    names: Mapping[int, str] | None = None
    ignore: int | None = None
    source: Path | None = None
    regions: bool = False


def find_labels(truth: Path, predictions: Path) -> LabelScheme:
    """Read the labels from a dataset.json in the folder of the predictions or of the truth, or in the latter's parent.

    Raises:
        UserError: the file is not a dataset.json of nnU-Net.
    """
    places = (predictions, truth, truth.resolve().parent)
    file = next((place / "dataset.json" for place in places if (place / "dataset.json").is_file()), None)
    if file is None:
        return LabelScheme()
    try:
        declared: Mapping[str, Any] = read_json(file)["labels"]
        values = {name: sorted({int(label) for label in (value if isinstance(value, list) else [value])})
                  for name, value in declared.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"the labels in {file} cannot be read ({type(error).__name__}: {error}), expected "
                        '"labels": {"background": 0, "organ": 1}', "correct or remove the file") from error
    ignore = next(iter(values.pop("ignore", [])), None)
    plain: dict[int, str] = {}
    # a label that is a region by itself gets the name of the region, parts of larger regions have no name
    for name, labels in sorted(values.items(), key=lambda item: len(item[1])):
        plain.update({label: name if len(labels) == 1 else "" for label in labels if label not in {0, ignore, *plain}})
    return LabelScheme(dict(sorted(plain.items())), ignore, file, any(len(labels) > 1 for labels in values.values()))


@dataclass(frozen=True)
class CaseAttributes:
    """Attributes of the evaluated cases.

    Attributes:
        columns: column -> case -> cell, for every case; "" for a case without a row.
        without_row: cases without a row in the table.
        file: the table; None without a table.
    """

    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    without_row: tuple[str, ...] = ()
    file: Path | None = None

    def patient(self, case: str) -> str:
        """Identify the patient of a case; a case without a patient counts as a patient of its own."""
        cell = self.columns.get(PATIENT, {}).get(case, "")
        # prefixes, since a patient may have the name of another case
        return f"case {case}" if is_missing(cell) else f"patient {cell}"

    def groupings(self, by: Sequence[str], cases: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        """Group cases by columns.

        Args:
            by: columns; with several, cases are also grouped by their combination.
            cases: cases to group.

        Returns:
            Grouping -> group -> cases. The first grouping is `ALL`; cases with a missing value are in `UNKNOWN`.

        Raises:
            UserError: a column does not exist (the message suggests the nearest), or has more than `MOST_GROUPS`
                values.
        """
        keys = {name: self._cells(name, cases) for name in dict.fromkeys(by)}
        if len(keys) > 1:
            keys[CROSS.join(keys)] = {case: self._crossed([cells[case] for cells in keys.values()]) for case in cases}
        groupings = {ALL: {ALL: tuple(cases)}}
        for name, cells in keys.items():
            # "unknown" comes last
            ordered = sorted(cases, key=lambda case: (cells[case] == UNKNOWN, cells[case]))
            groupings[name] = {group: tuple(members) for group, members in groupby(ordered, key=cells.__getitem__)}
        return groupings

    def _cells(self, name: str, cases: Sequence[str]) -> dict[str, str]:
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1, cutoff=0.0)
            fix = f"write --by {near[0]}" if near else "name the table with --attributes attributes.csv"
            raise UserError(f"there is no column '{name}' to group by, found {listed(self.columns) or 'none'}", fix)
        cells = {case: UNKNOWN if is_missing(self.columns[name][case]) else self.columns[name][case] for case in cases}
        if (count := len(set(cells.values()))) > MOST_GROUPS:
            raise UserError(f"column '{name}' has {count} different values in {len(cases)} cases, expected at most "
                            f"{MOST_GROUPS} groups", f"add a column with ranges, such as age_group, to {self.file}")
        return cells

    @staticmethod
    def _crossed(cells: Sequence[str]) -> str:
        return UNKNOWN if UNKNOWN in cells else CROSS.join(cells)


def join_attributes(file: Path | None, cases: Sequence[str], ending: str) -> CaseAttributes:
    """Read a table of attributes for the evaluated cases.

    Args:
        file: comma-separated values with a column ``case`` and one row per case, or the folder of an attributes.csv;
            None: no table.
        cases: evaluated cases.
        ending: file name suffix of the cases, for messages.

    Raises:
        UserError: the table cannot be read, has faults (the message lists them), has none of the cases, or has a column
            with the name of a metric.
    """
    if file is None:
        return CaseAttributes()
    file = file / ATTRIBUTES if file.is_dir() else file
    rows = _read_rows(file)
    check_case_names([row[CASE] for row in rows], cases, ending, str(file))
    by_case = {row[CASE]: row for row in rows}
    names = [name for name in (rows[0] if rows else ()) if name != CASE]
    columns = {name: {case: by_case.get(case, {}).get(name, "") for case in cases} for name in names}
    return CaseAttributes(columns, tuple(case for case in cases if case not in by_case), file)


def _read_rows(file: Path) -> list[dict[str, str]]:
    header, rows = read_csv_table(file)
    if CASE not in header:
        raise UserError(f"{file} has the columns {listed(header) or 'none'}, expected a column '{CASE}'",
                        "write the names of the columns into the first row, separated by commas")
    # spreadsheets export empty columns without a name
    names = [name for name in header if name]
    faults = [f"column {name} occurs more than once" for name, count in Counter(names).items() if count > 1]
    faults += [f"column {name} has the name of a column of metrics.csv" for name in names
               if name in {"label", *METRICS}]
    faults += [f"line {line} has {len(row)} cells, expected {len(header)}" for line, row in rows.items()
               if len(row) != len(header)]
    whole = {line: dict(zip(header, row)) for line, row in rows.items() if len(row) == len(header)}
    faults += [f"line {line} has no case" for line, row in whole.items() if not row[CASE]]
    faults += [f"case {case} has more than one row" for case, count in _counts(whole.values()) if count > 1]
    if faults:
        raise UserError(f"{file} has {len(faults)} faults: {listed(faults)}", "correct the table")
    return [{name: row[name] for name in names} for row in whole.values()]


def _counts(rows: Iterable[Mapping[str, str]]) -> list[tuple[str, int]]:
    return [(case, count) for case, count in Counter(row[CASE] for row in rows).items() if case]
