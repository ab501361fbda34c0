"""Checkpoints of the pretraining: whole or not at all, on the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_cfcl.atomic import replace_atomically


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
