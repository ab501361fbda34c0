"""Checkpoints: whole or not at all, on the CPU, read without running anything that a file may hold.

PyTorch's files are zip archives, which keep size and checksum of every tensor; PyTorch itself does not look at them.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as
from nnunet_cfcl.files.atomic import replace_atomically

#: NumPy's numbers and texts, which nnU-Net's logs and settings are made of.
_NUMBERS = (np.bool_, np.int32, np.int64, np.float32, np.float64, np.str_)
_PLAIN: list[Any] = [
    np.dtype, np.float64(0).__reduce__()[0], *_NUMBERS, *(type(np.dtype(kind)) for kind in _NUMBERS)]


def save_checkpoint(content: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """`torch.save`, atomically, with every tensor on the CPU: nnU-Net loads weights without a ``map_location``."""
    replace_atomically(file, lambda temporary: torch.save(to_cpu(content), temporary))


def load_checkpoint(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of a checkpoint that `save_checkpoint` wrote, with its tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged or no such checkpoint.
    """
    return read_plain(file, "checkpoint", "delete it and repeat the command that wrote it")


def read_plain(file: str | os.PathLike[str], what: str, fix: str) -> dict[str, Any]:
    """Read a checkpoint of tensors, numbers and strings to the CPU; anything else is rejected, and nothing is run.

    Args:
        file: written by `torch.save`.
        what: kind of the file, for the message.
        fix: the fix of an unreadable file.

    Raises:
        UserError: the file is missing, cut short, changed since it was written, or holds anything else.
    """
    place = Path(file)

    def translate(error: Exception) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"there is no {what} {file}", fix)
        if isinstance(error, UnpicklingError):
            # torch's own text is a page, and ends with the advice to trust the file
            return UserError(f"{file} cannot be read as a {what} (it is no archive of PyTorch, or holds more than "
                             "tensors, numbers and texts, which could run code)", fix)
        return UserError(f"{file} cannot be read as a {what}, it is damaged ({first_line(error)})", fix)

    with foreign_errors_as(translate):
        _check_archive(place)
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(place, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise UserError(f"{file} cannot be read as a {what}, it holds a {type(content).__name__}", fix)
    return content


def check_checkpoint(file: str | os.PathLike[str], fix: str) -> None:
    """Make sure that a checkpoint is as it was written, before nnU-Net, which does not look, loads it.

    Args:
        file: written by `torch.save`.
        fix: what is to be done about a damaged one; ends the message.

    Raises:
        UserError: the file is missing, cut short, or changed since it was written.
    """
    with foreign_errors_as(lambda error: UserError(
            f"there is no checkpoint {file}" if isinstance(error, FileNotFoundError)
            else f"the checkpoint {file} is damaged ({first_line(error)})", fix)):
        _check_archive(Path(file))


def _check_archive(file: Path) -> None:
    """Refuses an archive that is not as it was written; files of old versions of PyTorch are none."""
    with open(file, "rb") as content:
        if content.read(2) != b"PK":
            return
    with zipfile.ZipFile(file) as archive:
        # PyTorch compresses nothing; a small file could become as large as it likes
        if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
            raise ValueError("its parts are compressed")
        if broken := archive.testzip():
            raise ValueError(f"the checksum of {broken} is wrong")


def to_cpu(content: Any) -> Any:
    """The same nested dictionaries, lists and tuples with tensors detached and on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().cpu()
    if isinstance(content, dict):
        return {key: to_cpu(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(to_cpu(value) for value in content)
    return content


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of names and bytes of weights."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def load_body(network: nn.Module, weights: dict[str, Tensor], keep_heads: bool = True) -> None:
    """Load pretrained weights; the segmentation layers only where they were pretrained as well.

    Args:
        network: whose weights are replaced.
        weights: of the same network, segmentation layers may be missing.
        keep_heads: the network keeps its own segmentation layers, which depend on the labels.

    Raises:
        RuntimeError: a key or a shape of the rest does not fit.
    """
    own = network.state_dict()
    body = {key: value for key, value in weights.items() if not (keep_heads and ".seg_layers." in key)}
    kept = {key: value for key, value in own.items() if ".seg_layers." in key}
    network.load_state_dict({**kept, **body})
