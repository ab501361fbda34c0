"""Freezing of pretrained weights while freshly initialised segmentation layers are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer


def freeze_body(optimizer: Optimizer, network: nn.Module, frozen: Callable[[], bool]) -> None:
    """Freeze all parameters except the segmentation layers' for as long as ``frozen`` returns True.

    Gradients of freshly initialised segmentation layers distort pretrained features, which costs most accuracy on
    out-of-distribution data: linear probing, then fine-tuning (LP-FT, Kumar et al. 2022, arXiv 2202.10054). All
    gradients are computed, since DistributedDataParallel expects them, and dropped before the step: neither weight
    decay nor momentum changes a parameter without a gradient.

    Args:
        optimizer: optimiser of all parameters.
        network: nnU-Net's network, wrapped or not.
        frozen: function that is called at every step; True skips all but the segmentation layers.
    """
    body = [parameter for name, parameter in network.named_parameters() if "seg_layers." not in name]

    def drop(*_: Any) -> None:
        if frozen():
            for parameter in body:
                parameter.grad = None

    optimizer.register_step_pre_hook(drop)
