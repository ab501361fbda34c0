"""The generated parts of ``docs/reference/compatibility.md``.

    python -m tests.compatibility.page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunet_cfcl.files.atomic import write_text_atomically
from tests.compatibility.environments import CHECKOUT
from tests.compatibility.features import FEATURES
from tests.generated_blocks import with_blocks

PAGE = CHECKOUT / "docs" / "reference" / "compatibility.md"
VERSIONS_FILE = CHECKOUT / "docs" / "reference" / "nnunet-versions.json"


def measured_versions() -> dict[str, Any]:
    """What the matrix has written: ``python``, ``torch``, ``versions`` (version -> ``steps``, ``notes``)."""
    if not VERSIONS_FILE.exists():
        return {"versions": {}}
    measured: dict[str, Any] = json.loads(VERSIONS_FILE.read_text(encoding="utf-8"))
    return measured


def version_numbers(version: str) -> tuple[int, ...]:
    """``"2.8.1"`` -> ``(2, 8, 1)``."""
    return tuple(int(number) for number in version.split("."))


def versions_table(measured: dict[str, Any]) -> str:
    """A row for every version of nnU-Net, the newest first; a cell for every step, empty where it was not reached."""
    if not measured["versions"]:
        return "Not measured yet."
    steps = list(max((one["steps"] for one in measured["versions"].values()), key=len))
    lines = [f"| nnU-Net | {' | '.join(steps)} | notes |", "|---" * (len(steps) + 2) + "|"]
    for version in sorted(measured["versions"], key=version_numbers, reverse=True):
        found = measured["versions"][version]
        cells = [_cell(found["steps"].get(step, "")) for step in steps]
        lines.append(f"| {version} | {' | '.join(cells)} | {'; '.join(found['notes']).replace('|', '/')} |")
    machine = f"Measured with Python {measured['python']} and torch {measured['torch']}, on a CPU."
    return "\n".join([*lines, "", machine])


def _cell(found: str) -> str:
    return found if found in ("ok", "") else f"**fails**: {found.replace('|', '/')}"


def features_table() -> str:
    """A row for every feature of nnU-Net: what happens, and the tests that show it."""
    lines = ["| nnU-Net's | with this plugin | shown by |", "|---|---|---|"]
    for feature in FEATURES:
        tests = ", ".join(f"`{test.replace('::', ' :: ')}`" for test in feature.tests)
        lines.append(f"| {feature.name} | {feature.result} | {tests} |")
    return "\n".join(lines)


def page_text(text: str) -> str:
    """The page with its tables made anew."""
    return with_blocks(text, {"versions": versions_table(measured_versions()), "features": features_table()})


def write_page() -> Path:
    """Bring the page up to date."""
    write_text_atomically(PAGE, page_text(PAGE.read_text(encoding="utf-8")))
    return PAGE


if __name__ == "__main__":
    print(write_page())
