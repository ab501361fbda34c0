"""Backup of files that an earlier run left."""

from __future__ import annotations

from pathlib import Path

from nnunet_cfcl.files.atomic import backup_path
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.runs.ranks import Ranks


def back_up(fold: FoldContext, ranks: Ranks, *files: Path) -> None:
    """Rename files of an earlier run on the main rank, so that they are neither lost nor continued by mistake."""
    for file in files:
        if ranks.is_main and fold.saves and file.exists():
            kept = file.replace(backup_path(file, "previous"))
            fold.log(f"{file.name} of an earlier run is kept as {kept.name}")
