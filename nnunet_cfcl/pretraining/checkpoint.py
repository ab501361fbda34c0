"""Checkpoints that a kill cannot spoil: written to a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def replace_atomically(file: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` make a temporary file beside ``file``, force it to disk, then rename it to ``file``.

    Whoever reads ``file`` sees the old content or the new one. Nothing happens where ``write`` makes no file.
    """
    target = Path(file)
    temporary = target.with_name(f"{target.name}.tmp")
    write(temporary)
    if not temporary.exists():
        return
    with open(temporary, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, target)


def write_text(file: Path, text: str) -> None:
    """`Path.write_text` without its return value, for `replace_atomically`."""
    file.write_text(text)


def save_checkpoint(content: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """`torch.save`, atomically, with every tensor on the CPU: nnU-Net loads weights without a ``map_location``."""
    replace_atomically(file, lambda temporary: torch.save(to_cpu(content), temporary))


def load_checkpoint(file: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint with its tensors on the CPU."""
    content = torch.load(file, map_location="cpu", weights_only=False)
    assert isinstance(content, dict)
    return content


def to_cpu(content: Any) -> Any:
    """The same nested dictionaries, lists and tuples with tensors detached and on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().cpu()
    if isinstance(content, dict):
        return {key: to_cpu(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(to_cpu(value) for value in content)
    return content
