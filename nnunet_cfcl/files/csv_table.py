"""Tables of comma-separated values about cases, written in spreadsheets or by hand."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from nnunet_cfcl.errors import UserError, listed


def read_csv_table(file: Path) -> tuple[list[str], dict[int, list[str]]]:
    """Read the header, and the rows that are not empty by the number of their (last) line; cells are single lines.

    Raises:
        UserError: the file cannot be read as a table of comma-separated values in UTF-8.
    """
    try:
        # spreadsheets write a byte order mark
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            header = _cells(next(reader, []))
            rows = [(reader.line_num, _cells(row)) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table of comma-separated values in UTF-8 ({error})",
                        "save it in this format, or remove it") from error
    return header, {line: row for line, row in rows if any(row)}


def _cells(row: Sequence[str]) -> list[str]:
    """Cells without surrounding spaces, each in one line.

    Raises:
        ValueError: a NUL character, with which a crash may fill a file up.
    """
    if any("\0" in cell for cell in row):
        raise ValueError("it holds the character NUL")
    return [" ".join(cell.split()) for cell in row]


def check_case_names(named: Collection[str], known: Collection[str], ending: str, table: str) -> None:
    """Reject a table that calls the cases by other names, and so would have no effect on them.

    Rows of other cases are allowed: a dataset's test cases may have some.

    Args:
        named: names of cases in the table.
        known: names of the cases of the dataset.
        ending: file ending of the dataset's images.
        table: name of the table, for messages.

    Raises:
        UserError: the table has file names of known cases, or no known case at all.
    """
    unknown = sorted(set(named) - set(known))
    files = [name for name in unknown if re.sub(r"_\d{4}$", "", name.removesuffix(ending)) in known]
    if files:
        raise UserError(f"{table} has {len(files)} names of files where names of cases are expected: {listed(files)}",
                        f"write them without _0000 and without {ending}")
    if known and unknown and len(unknown) == len(set(named)):
        raise UserError(f"{table} names none of the {len(known)} known cases, such as {sorted(known)[0]}, but "
                        f"{len(unknown)} others: {listed(unknown)}", "write the names of the cases")
