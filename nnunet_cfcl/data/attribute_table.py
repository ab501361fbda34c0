"""Readers of a raw dataset's ``attributes.csv`` (a row per case, a column per attribute) and ``attributes.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.errors import UserError, listed, shown
from nnunet_cfcl.files.csv_table import read_csv_table
from nnunet_cfcl.files.json_files import read_json

ATTRIBUTES, DECLARATIONS = "attributes.csv", "attributes.json"
CASE, PATIENT = "case", "patient"


@dataclass(frozen=True)
class AttributeTable:
    """Cells of ``attributes.csv`` as written.

    Attributes:
        cases: case identifiers in the order of the rows.
        columns: column name -> cells, one per case; without the column ``case``.
    """

    cases: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]

    @property
    def attributes(self) -> dict[str, dict[str, str]]:
        """Attribute -> case -> cell; the column ``patient`` groups cases and is not an attribute."""
        return {name: dict(zip(self.cases, cells)) for name, cells in self.columns.items() if name != PATIENT}


def read_attribute_table(raw_folder: Path) -> AttributeTable | None:
    """Read the table of a raw dataset; None where there is none.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Raises:
        UserError: the table cannot be read, lacks the column ``case``, has duplicate columns, rows whose length differs
            from the header's, rows without a case, or duplicate cases; the error lists all of them.
    """
    file = raw_folder / ATTRIBUTES
    if not file.exists():
        return None
    header, rows = read_csv_table(file)
    if CASE not in header:
        raise UserError(f"{file} must have one column '{CASE}', found the columns {', '.join(header) or 'none'}",
                        "name the columns in the first row, separated by commas")
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise UserError(f"{file} has duplicate columns: {listed(map(repr, twice))}",
                        "rename or remove all but one of each")
    _check_rows(file, header, rows)
    # spreadsheets leave unnamed columns behind
    columns = {name: tuple(row[index] for row in rows.values()) for index, name in enumerate(header)}
    return AttributeTable(columns.pop(CASE), {name: cells for name, cells in columns.items() if name})


def _check_rows(file: Path, header: Sequence[str], rows: Mapping[int, Sequence[str]]) -> None:
    errors = [f"line {line} has {len(row)} cells, expected {len(header)}" for line, row in rows.items()
              if len(row) != len(header)]
    whole = {line: row[header.index(CASE)] for line, row in rows.items() if len(row) == len(header)}
    errors += [f"line {line} has no case" for line, case in whole.items() if not case]
    twice = [case for case, count in Counter(whole.values()).items() if case and count > 1]
    errors += [f"case {case} has more than one row" for case in twice]
    if errors:
        raise UserError(f"{file} has {len(errors)} errors: {listed(errors)}", "correct these rows")


def read_declared_kinds(raw_folder: Path) -> dict[str, str]:
    """Read the kinds declared in ``attributes.json``, such as ``{"site": "categorical", "age": "continuous"}``.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Returns:
        Attribute -> kind, unchecked; empty without the file.

    Raises:
        UserError: the file is not such a JSON object.
    """
    file = raw_folder / DECLARATIONS
    if not file.exists():
        return {}
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error})", "correct or remove it") from error
    if not isinstance(content, dict) or not all(isinstance(kind, str) for kind in content.values()):
        raise UserError(f'{file} must hold an object such as {{"site": "categorical", "age": "continuous"}}, '
                        f"found {shown(content)}", "correct or remove it")
    return content
