"""The last decoder map of every sliding window, taken from the forward passes that predict the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_cfcl.chromap.plane_accumulator import Box, PlaneAccumulator
from nnunet_cfcl.nnunet.decoder_tap import decoder_width, plain_network


class WindowFeatures:
    """Reduce the input of the network's last segmentation layer and hand it on, one window at a time.

    Args:
        accumulator: accumulator of the windows.
        boxes: boxes of the windows, in the order in which they are predicted.
        reduce: (F, *window) -> (k, *window).
        mirror_axes: axes in which nnU-Net mirrors windows, the features of which are averaged; empty: only those of the
            window as it is.
    """

    def __init__(
        self, accumulator: PlaneAccumulator, boxes: Sequence[Box], reduce: Callable[[Tensor], Tensor],
        mirror_axes: Sequence[int] = (),
    ) -> None:
        self.accumulator, self._reduce = accumulator, reduce
        self._boxes = iter(boxes)
        # as nnU-Net's predictor goes through them: the window as it is, then every combination of axes
        self._flips = [axes for count in range(len(mirror_axes) + 1) for axes in combinations(mirror_axes, count)]
        self._passes = 0
        self._mean: Tensor | None = None

    def take(self, features: Tensor) -> None:
        """Take the last decoder map (1, F, *window) of one pass."""
        if self._passes < len(self._flips):
            flip = [axis + 1 for axis in self._flips[self._passes]]
            reduced = self._reduce(features[0]).flip(flip) / len(self._flips)
            self._mean = reduced if self._mean is None else self._mean + reduced
        self._passes += 1

    def end_window(self) -> None:
        """Hand the mean over all passes of a window on.

        Raises:
            RuntimeError: the network's last segmentation layer was not reached in the window's passes.
        """
        if self._mean is None:
            raise RuntimeError("no features reached the network's last segmentation layer")
        self.accumulator.add(next(self._boxes), self._mean)
        self._passes, self._mean = 0, None


@contextmanager
def features_to(network: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Context in which ``take`` receives the last decoder map (N, F, *patch) of every pass of the network.

    The output of the network does not change. Under torch.compile the block must begin before the first pass.

    Raises:
        UserError: the network has no decoder of nnU-Net's kind.
    """
    decoder_width(network)
    decoder: Any = plain_network(network).decoder

    @torch.compiler.disable
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        take(inputs[0])

    handle = decoder.seg_layers[-1].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
