"""JSON that may have been edited, or cut short by a kill: reading it never raises."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_cfcl.files.json_files import read_json


def read_json_object(file: Path, problems: list[str]) -> dict[str, Any]:
    """Read the object in a file; empty where the file is missing or broken.

    Args:
        file: JSON in UTF-8.
        problems: list to which a line is added if the file is there and cannot be used.
    """
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        problems.append(f"{file.name} cannot be read ({type(error).__name__}: {str(error)[:120]})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file.name} holds no JSON object, but a {type(content).__name__}")
        return {}
    return content


def read_json_lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read the objects in the lines of a file.

    Other lines are left out, and added to ``problems`` unless only the last line is broken, which a kill may cut short.
    """
    if not file.is_file():
        return []
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(f"{file.name} cannot be read ({error.strerror})")
        return []
    lines = [json_object(text) for text in texts]
    broken = [number + 1 for number, line in enumerate(lines) if line is None]
    if [number for number in broken if number < len(lines)]:
        problems.append(f"{file.name} has {len(broken)} lines that are no JSON objects, the first in line {broken[0]}")
    return [line for line in lines if line is not None]


def json_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; None where the text is something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def as_object(content: Any) -> Mapping[str, Any]:
    """The content if it is an object, else an empty object."""
    return content if isinstance(content, dict) else {}


def as_list(content: Any) -> Sequence[Any]:
    """The content if it is a list, else an empty list."""
    return content if isinstance(content, list) else []


def as_number(content: Any) -> float:
    """The content if it is a finite number, else NaN."""
    is_number = isinstance(content, (int, float)) and not isinstance(content, bool)
    try:
        number = float(content) if is_number else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
