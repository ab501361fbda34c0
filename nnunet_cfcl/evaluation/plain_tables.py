"""Records as JSON without NaN, and as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def without_nan(content: Any) -> Any:
    """JSON has no NaN: null says that there is no figure."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells may hold what people write."""
    lines = [columns, ["---"] * len(columns), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
