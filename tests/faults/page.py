"""The tables of ``docs/results/faults.md``.

    CFCL_FAULT_RECORD=docs/results/kills.json pytest -m nightly tests/end_to_end/test_kill.py
    python -m tests.faults.page            # with --inputs every unusual image is tried again (minutes)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_cfcl.files.atomic import write_text_atomically
from tests.faults.tried import FAULTS
from tests.generated_blocks import with_blocks
from tests.pretraining import unusual_inputs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "faults.md"
KILLS_FILE = ROOT / "docs" / "results" / "kills.json"


def kills_table(record: dict[str, Any]) -> str:
    """A row for every phase in the record of `tests.end_to_end.kills.Killer.write`."""
    lines = ["| phase | undisturbed, s | kills | when, in seconds after its begin | then |", "|---|---|---|---|---|"]
    killed = [kill for kill in record["kills"] if kill["outcome"] == "killed"]
    for phase, seconds in record["seconds_undisturbed"].items():
        moments = [kill["seconds"] for kill in killed if kill["phase"] == phase]
        when = ", ".join(f"{moment:.1f}" for moment in sorted(moments))
        lines.append(f"| {phase} | {seconds:.1f} | {len(moments)} | {when} | {record['result']} |")
    return "\n".join([*lines, "", f"{len(killed)} kills, seed {record['seed']}."])


def faults_table() -> str:
    """A row for every fault of `FAULTS`."""
    lines = ["| fault or input | tried | what happened | lost | shown by |", "|---|---|---|---|---|"]
    for fault in FAULTS:
        tests = ", ".join(f"`{test.replace('::', ' :: ')}`" for test in fault.tests)
        lines.append(f"| {fault.name} | {fault.number} | {fault.result} | {fault.lost} | {tests} |")
    return "\n".join(lines)


def page_text(text: str) -> str:
    """The page with the tables of kills and faults made anew."""
    record = json.loads(KILLS_FILE.read_text(encoding="utf-8"))
    return with_blocks(text, {"kills": kills_table(record), "faults": faults_table()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Bring the page up to date."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.page", description="Make the tables of faults anew.")
    parser.add_argument("--inputs", action="store_true", help="try every unusual image again (minutes)")
    chosen = parser.parse_args(arguments)
    text = page_text(PAGE.read_text(encoding="utf-8"))
    if chosen.inputs:
        text = with_blocks(text, {"inputs": unusual_inputs.table()})
    write_text_atomically(PAGE, text)


if __name__ == "__main__":
    main()
