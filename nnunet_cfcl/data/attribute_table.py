"""``attributes.csv`` of a raw dataset, one row per case and one column per attribute; ``attributes.json`` beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.csv_table import read_csv_table
from nnunet_cfcl.files.json_files import read_json

ATTRIBUTES, DECLARATIONS = "attributes.csv", "attributes.json"
CASE, PATIENT = "case", "patient"


@dataclass(frozen=True)
class AttributeTable:
    """The cells of the table, as they are written.

    Attributes:
        cases: in the order of the rows.
        columns: name of a column -> its cells, one per case; the column ``case`` is not among them.
    """

    cases: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]

    @property
    def attributes(self) -> dict[str, dict[str, str]]:
        """Attribute -> case -> cell; the column ``patient`` groups cases and is no attribute."""
        return {name: dict(zip(self.cases, cells)) for name, cells in self.columns.items() if name != PATIENT}


def read_attribute_table(raw_folder: Path) -> AttributeTable | None:
    """The table of a raw dataset; None where there is none.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Raises:
        UserError: the table cannot be read, has no column ``case``, a column twice, rows of another
            length than its header, rows without a case, or a case in two rows; all of them are named.
    """
    file = raw_folder / ATTRIBUTES
    if not file.exists():
        return None
    header, rows = read_csv_table(file)
    if CASE not in header:
        raise UserError(f"{file} must have one column '{CASE}', found the columns {', '.join(header) or 'none'}", "the "
                        "first row names them, separated by commas")
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise UserError(f"{file} must have each column once, found more than one {listed(map(repr, twice))}",
                        "rename or "
                        "remove columns")
    _check_rows(file, header, rows)
    # spreadsheets leave columns without a name behind
    columns = {name: tuple(row[index] for row in rows.values()) for index, name in enumerate(header)}
    return AttributeTable(columns.pop(CASE), {name: cells for name, cells in columns.items() if name})


def _check_rows(file: Path, header: Sequence[str], rows: Mapping[int, Sequence[str]]) -> None:
    faults = [f"line {line} has {len(row)} cells, expected {len(header)}" for line, row in rows.items()
              if len(row) != len(header)]
    whole = {line: row[header.index(CASE)] for line, row in rows.items() if len(row) == len(header)}
    faults += [f"line {line} names no case" for line, case in whole.items() if not case]
    twice = [case for case, count in Counter(whole.values()).items() if case and count > 1]
    faults += [f"case {case} is there more than once" for case in twice]
    if faults:
        raise UserError(f"{file} has {len(faults)} faults: {listed(faults)}", "mend these rows")


def read_declared_kinds(raw_folder: Path) -> dict[str, str]:
    """What ``attributes.json`` says of the attributes, ``{"site": "categorical", "age": "continuous"}``.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Returns:
        Attribute -> kind, not checked; empty without the file.

    Raises:
        UserError: it is not such a JSON object.
    """
    file = raw_folder / DECLARATIONS
    if not file.exists():
        return {}
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error})", "mend it or take it away") from error
    if not isinstance(content, dict) or not all(isinstance(kind, str) for kind in content.values()):
        raise UserError(f'{file} must be an object like {{"site": "categorical", "age": "continuous"}}', 'mend it or '
                        "take it away")
    return content
