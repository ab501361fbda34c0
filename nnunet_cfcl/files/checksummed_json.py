"""JSON objects that only the package itself changes, with a checksum: a damaged one is told from a sound one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.json_files import read_json

CHECKSUM = "checksum"


def checksummed_text(content: Mapping[str, Any]) -> str:
    """A JSON object with a checksum of its content; keys are texts."""
    return json.dumps({**content, CHECKSUM: digest(content)}, indent=1)


def read_checksummed(file: Path) -> dict[str, Any]:
    """The object in a file of `checksummed_text`, without the checksum; files of earlier versions have none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or not as it was written.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"it holds no object, but a {type(content).__name__}")
    found = content.pop(CHECKSUM, None)
    if found is not None and found != digest(content):
        raise ValueError("its checksum is wrong: it was damaged, or changed by hand")
    return content
