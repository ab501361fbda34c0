"""Keeping pretrained weights as they are while fresh segmentation layers learn to use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer


def freeze_body(optimizer: Optimizer, network: nn.Module, frozen: Callable[[], bool]) -> None:
    """Let the optimiser skip all parameters but those of the segmentation layers as long as ``frozen`` says so.

    Gradients of fresh segmentation layers distort pretrained features, which costs most on data unlike the labelled:
    linear probing, then fine-tuning (LP-FT, arXiv 2202.10054). The gradients are dropped before the step rather than
    not computed, since networks wrapped for several GPUs expect all of them: neither weight decay nor momentum moves a
    parameter without a gradient.

    Args:
        optimizer: of all parameters.
        network: nnU-Net's, wrapped or not.
        frozen: asked at every step.
    """
    body = [parameter for name, parameter in network.named_parameters() if "seg_layers." not in name]

    def drop(*_: Any) -> None:
        if frozen():
            for parameter in body:
                parameter.grad = None

    optimizer.register_step_pre_hook(drop)
