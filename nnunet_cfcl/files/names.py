"""File names that come from the content of other files."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath


def is_safe_filename(name: str) -> bool:
    """Whether a name is that of a file, on any system: no path, no drive, no control character."""
    return name.isprintable() and name not in ("", "..") and all(
        kind(name).name == name for kind in (PurePosixPath, PureWindowsPath))
