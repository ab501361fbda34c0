"""Tables of comma-separated values that people write, in spreadsheets or by hand."""

from __future__ import annotations

import csv
from pathlib import Path

from nnunet_cfcl.errors import UserError


def read_csv_table(file: Path) -> tuple[list[str], dict[int, list[str]]]:
    """The header, and the rows that are not empty by the number of their (last) line; cells without the spaces around.

    Raises:
        UserError: the file cannot be read as such a table.
    """
    try:
        # spreadsheets write a byte order mark
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table of comma-separated values in UTF-8 ({error}); save it again "
                        "as such, or take it away") from error
    return header, {line: row for line, row in rows if any(row)}
