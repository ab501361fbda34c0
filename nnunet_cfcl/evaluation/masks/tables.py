"""What is on disk for an evaluation: folders of masks, which labels count, and the attributes of the cases."""

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
#: A column with more values than this is no grouping (ages, dates, remarks).
MOST_GROUPS = 20
#: Between the columns and the values of a grouping by several columns.
CROSS = " x "


@dataclass(frozen=True)
class MaskFolder:
    """A folder of masks and what it is called.

    Attributes:
        name: of the method, or "truth".
        folder: where the files are.
        files: case -> its file.
    """

    name: str
    folder: Path
    files: Mapping[str, Path]


def read_folder(folder: Path, name: str) -> MaskFolder:
    """The masks in a folder, keyed by file name without ending; other files, such as ``.npz``, do not count.

    Raises:
        UserError: there is no such folder, it has no masks, or two files of one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, expected a folder of masks ({listed(READERS)})", "mend the path")
    found = sorted((case, path) for path in folder.iterdir()
                   if path.is_file() and (case := case_of(path.name)) is not None)
    if not found:
        raise UserError(f"{folder} has no masks, expected files of {listed(READERS)}", "name the folder in which they "
                        "are")
    if twice := [case for case, count in Counter(case for case, _ in found).items() if count > 1]:
        raise UserError(f"{folder} has more than one file of {len(twice)} cases: {listed(twice)}", "keep one of "
                        "each")
    return MaskFolder(name, folder, dict(found))


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """The methods' names and folders, as they are typed: ``FOLDER``, called as the folder, or ``NAME=FOLDER``.

    Raises:
        UserError: a name that is no file name, or that two folders have (on some systems A and a are one file).
    """
    named = [_named_folder(text) for text in texts]
    if twice := [name for name, count in Counter(name.casefold() for name, _ in named).items() if count > 1]:
        raise UserError(f"two folders are called {twice[0]}, expected a name for each",
                        "write other names before them, "
                        f"as in --against other={named[-1][1]}")
    return dict(named)


def _named_folder(text: str) -> tuple[str, Path]:
    before, equals, after = text.partition("=")
    # a folder's own path may have an equals sign
    is_named = bool(equals and after) and not Path(text).is_dir()
    name, folder = (before, Path(after)) if is_named else (Path(text).resolve().name, Path(text))
    # the name becomes part of a file name, which must stay in its folder
    if not re.fullmatch(r"\w[\w .+()-]*", name):
        raise UserError(f"'{name}' is no name for a method: expected letters, digits, spaces and . _ + - ( ) from "
                        f"{text}", "write NAME=FOLDER")
    return name, folder


@dataclass(frozen=True)
class LabelScheme:
    """Which labels are evaluated.

    Attributes:
        names: label -> its name in dataset.json, for messages; None: whatever is in the masks, except 0.
        ignore: label of voxels without a truth.
        source: dataset.json, or None.
        regions: whether dataset.json has regions, whose plain labels are evaluated instead.
    """

    names: Mapping[int, str] | None = None
    ignore: int | None = None
    source: Path | None = None
    regions: bool = False


def find_labels(truth: Path, predictions: Path) -> LabelScheme:
    """The labels of the first dataset.json in the predictions' folder, the truth's folder and the folder that has it.

    Raises:
        UserError: the file is no dataset.json of nnU-Net.
    """
    places = (predictions, truth, truth.resolve().parent)
    file = next((place / "dataset.json" for place in places if (place / "dataset.json").is_file()), None)
    if file is None:
        return LabelScheme()
    try:
        declared: Mapping[str, Any] = read_json(file)["labels"]
        values = {name: sorted({int(one) for one in (value if isinstance(value, list) else [value])})
                  for name, value in declared.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} has no readable labels ({type(error).__name__}: {error}), expected "
                        '"labels": {"background": 0, "organ": 1}', 'mend it or take it away') from error
    ignore = next(iter(values.pop("ignore", [])), None)
    plain: dict[int, str] = {}
    # a label that is a region by itself is called as that; parts of larger regions have no name of their own
    for name, labels in sorted(values.items(), key=lambda item: len(item[1])):
        plain.update({label: name if len(labels) == 1 else "" for label in labels if label not in {0, ignore, *plain}})
    return LabelScheme(dict(sorted(plain.items())), ignore, file, any(len(labels) > 1 for labels in values.values()))


@dataclass(frozen=True)
class CaseAttributes:
    """The table of attributes, joined to the cases that are evaluated.

    Attributes:
        columns: column -> case -> cell, for every case; "" where it has no row.
        without_row: cases that the table does not know.
        file: the table; None without one.
    """

    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    without_row: tuple[str, ...] = ()
    file: Path | None = None

    def patient(self, case: str) -> str:
        """The patient of a case; one without is a patient of its own."""
        cell = self.columns.get(PATIENT, {}).get(case, "")
        # a patient may be called as another case is
        return f"case {case}" if is_missing(cell) else f"patient {cell}"

    def groupings(self, by: Sequence[str], cases: Sequence[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        """Which cases are in which groups.

        Args:
            by: columns; with several, also the groups of their combinations.
            cases: to be grouped.

        Returns:
            Grouping -> group -> its cases; first `ALL` of them; cases whose cell says nothing are in `UNKNOWN`.

        Raises:
            UserError: a column that is not there (the nearest is named), or with more than `MOST_GROUPS` values.
        """
        keys = {name: self._cells(name, cases) for name in dict.fromkeys(by)}
        if len(keys) > 1:
            keys[CROSS.join(keys)] = {case: self._crossed([cells[case] for cells in keys.values()]) for case in cases}
        groupings = {ALL: {ALL: tuple(cases)}}
        for name, cells in keys.items():
            # unknown comes last
            ordered = sorted(cases, key=lambda case: (cells[case] == UNKNOWN, cells[case]))
            groupings[name] = {group: tuple(members) for group, members in groupby(ordered, key=lambda one: cells[one])}
        return groupings

    def _cells(self, name: str, cases: Sequence[str]) -> dict[str, str]:
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1, cutoff=0.0)
            fix = f"did you mean --by {near[0]}?" if near else "name the table with --attributes attributes.csv"
            raise UserError(f"there is no column '{name}' to group by, found {listed(self.columns) or 'none'}", fix)
        cells = {case: UNKNOWN if is_missing(self.columns[name][case]) else self.columns[name][case] for case in cases}
        if (count := len(set(cells.values()))) > MOST_GROUPS:
            raise UserError(f"column '{name}' has {count} different values in {len(cases)} cases, expected at most "
                            f"{MOST_GROUPS} groups", f"add a column with ranges (such as age_group) to {self.file}")
        return cells

    @staticmethod
    def _crossed(cells: Sequence[str]) -> str:
        return UNKNOWN if UNKNOWN in cells else CROSS.join(cells)


def join_attributes(file: Path | None, cases: Sequence[str], ending: str) -> CaseAttributes:
    """The columns of a table for the cases that are evaluated.

    Args:
        file: of comma-separated values, one row per case in the column ``case``, or the folder of an attributes.csv;
            None: no table.
        cases: that are evaluated.
        ending: of their files, for messages.

    Raises:
        UserError: the table cannot be read, has faults (all are named), names none of the cases, or has a column of
            the name of a metric.
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
        raise UserError(f"{file} must have one column '{CASE}', found the columns {listed(header) or 'none'}", "the "
                        "first row names them, separated by commas")
    # spreadsheets leave columns without a name behind
    names = [name for name in header if name]
    faults = [f"column {name} more than once" for name, count in Counter(names).items() if count > 1]
    faults += [f"column {name}, which is the name of a column of metrics.csv" for name in names
               if name in {"label", *METRICS}]
    faults += [f"line {line} has {len(row)} cells, expected {len(header)}" for line, row in rows.items()
               if len(row) != len(header)]
    whole = {line: dict(zip(header, row)) for line, row in rows.items() if len(row) == len(header)}
    faults += [f"line {line} names no case" for line, row in whole.items() if not row[CASE]]
    faults += [f"case {case} in more than one row" for case, count in _counts(whole.values()) if count > 1]
    if faults:
        raise UserError(f"{file} has {len(faults)} faults: {listed(faults)}", "mend them")
    return [{name: row[name] for name in names} for row in whole.values()]


def _counts(rows: Iterable[Mapping[str, str]]) -> list[tuple[str, int]]:
    return [(case, count) for case, count in Counter(row[CASE] for row in rows).items() if case]
