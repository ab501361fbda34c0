"""JSON objects with a checksum, for files that only the package itself changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.json_files import read_json

CHECKSUM = "checksum"


def checksummed_text(content: Mapping[str, Any]) -> str:
    """JSON object with a checksum of its content; keys are strings."""
    return json.dumps({**content, CHECKSUM: digest(content)}, indent=1)


def read_checksummed(file: Path) -> dict[str, Any]:
    """Read the object of `checksummed_text` without its checksum, which files of earlier versions do not have.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no JSON object, or was changed since it was written.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"it holds no object, but a {type(content).__name__}")
    found = content.pop(CHECKSUM, None)
    if found is not None and found != digest(content):
        raise ValueError("its checksum is wrong: it was damaged, or changed by hand")
    return content
