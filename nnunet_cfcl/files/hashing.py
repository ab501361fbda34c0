"""Short hashes of content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(content: Any) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a JSON-ready object; equal content, equal digest."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; "" where there is none."""
    if not file.is_file():
        return ""
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            found.update(part)
    return found.hexdigest()
