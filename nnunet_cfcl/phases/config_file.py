"""Write ``fold_F/cfcl/config.json``: settings and identity of a training, with their hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_cfcl.files.atomic import writable_folder, write_text_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext


def write_config(
    fold: FoldContext, method: str, identity: Mapping[str, Any] | None = None, pretraining_folder: Path | None = None
) -> None:
    """Write the file atomically, unless nnU-Net's checkpointing is off.

    Args:
        fold: the fold that is trained; called on the main rank only.
        method: name of the pretraining method, "none" without pretraining.
        identity: everything that determines the pretrained weights.
        pretraining_folder: folder of the pretraining's checkpoints.
    """
    if not fold.saves:
        return
    settings, decides = fold.settings.to_dict(), dict(identity or {})
    content = {
        "method": method,
        "settings": settings, "settings_hash": digest(settings),
        "pretraining": decides, "pretraining_hash": digest(decides),
        "pretraining_folder": str(pretraining_folder or ""),
    }
    folder = fold.folder / "cfcl"
    writable_folder(folder, "free some space there or make it writable, then start again, with --c")
    write_text_atomically(folder / "config.json", json.dumps(content, indent=2))
