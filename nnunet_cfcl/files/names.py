"""Names that come from files and are to become names of files."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath


def is_safe_filename(name: str) -> bool:
    """Whether a file of this name lies in the folder that it is looked for in, on any system: no path, no drive, no
    control character."""
    return name.isprintable() and name not in ("", "..") and all(
        kind(name).name == name for kind in (PurePosixPath, PureWindowsPath))
