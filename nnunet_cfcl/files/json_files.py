"""Plain JSON files; any fault of a file is an `OSError` or a `ValueError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """Read a file in UTF-8, with or without the byte order mark that some editors write.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no JSON, no UTF-8, or nested too deeply.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
