"""Tables of comma-separated values about cases that people write, in spreadsheets or by hand."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from nnunet_cfcl.errors import UserError, listed


def read_csv_table(file: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header, and the rows that are not empty by the number of their (last) line; cells in one line.

    Raises:
        UserError: the file cannot be read as such a table.
    """
    try:
        # spreadsheets write a byte order mark
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            header = _cells(next(reader, []))
            rows = [(reader.line_num, _cells(row)) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table of comma-separated values in UTF-8 ({error})",
                        "save it again "
                        "as such, or take it away") from error
    return header, {line: row for line, row in rows if any(row)}


def _cells(row: Sequence[str]) -> list[str]:
    """Without the spaces around, and in one line.

    Raises:
        ValueError: a character that no table has; a file that is cut short by a crash may be filled up with it.
    """
    if any("\0" in cell for cell in row):
        raise ValueError("it holds the character NUL")
    return [" ".join(cell.split()) for cell in row]


def check_case_names(named: Collection[str], known: Collection[str], ending: str, table: str) -> None:
    """Refuse a table that speaks of the cases by other names, which would silently say nothing of them.

    Rows of other cases are no fault: a dataset's test cases may have some.

    Args:
        named: cases of the table.
        known: cases that it should speak of.
        ending: file ending of the dataset's images.
        table: where the names are from, in words.

    Raises:
        UserError: it has names of known cases' files, or of no known case at all.
    """
    unknown = sorted(set(named) - set(known))
    files = [name for name in unknown if re.sub(r"_\d{4}$", "", name.removesuffix(ending)) in known]
    if files:
        raise UserError(f"{table} has {len(files)} names of files where names of cases are expected: {listed(files)}",
                        f"write them without _0000 and without {ending}")
    if known and unknown and len(unknown) == len(set(named)):
        raise UserError(f"{table} names none of the {len(known)} known cases, such as {sorted(known)[0]}, but "
                        f"{len(unknown)} others: {listed(unknown)}", "write the names of the cases")
