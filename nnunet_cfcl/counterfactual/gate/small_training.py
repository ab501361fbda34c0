"""Short training of the small judging networks, with its augmentation and strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.runs.watchdog import beat, watched

#: Voxels per step: determines the number of images per step, within the bounds below.
VOXELS_PER_STEP = 1 << 20
FEWEST_IMAGES, MOST_IMAGES = 4, 16
#: Largest shift of an image, relative to its size.
SHIFT = 0.05

Network = TypeVar("Network", bound=nn.Module)


@watched("training of a judge")
def train_briefly(
    build: Callable[[], Network], count: int, loss_of: Callable[[Network, Tensor, Tensor], Tensor], steps: int,
    images_per_step: int, dim: int, seed: int, device: torch.device, peak_lr: float = 2e-3,
) -> Network:
    """Train a network with AdamW, a short warm-up and linear decay, under the watchdog; reproducible.

    Args:
        build: builds the network.
        count: number of images.
        loss_of: (network, indices (B,) of images, relative shifts (B, D) in [-1, 1]) -> scalar.
        steps: number of optimiser steps.
        images_per_step: number of images per step B.
        dim: number of spatial axes D.
        seed: seed of the initialisation and of all draws.
        device: device of the training.
        peak_lr: peak learning rate.

    Returns:
        The network on the device, in evaluation mode, with frozen parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed).initial_seed())
        network = build().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), peak_lr, weight_decay=1e-2)
    drawn = _rounds(count, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / (0.05 * steps + 1)) * (1 - step / steps)
        chosen = torch.tensor([next(drawn) for _ in range(images_per_step)])
        shares = 2 * torch.rand((len(chosen), dim), generator=generator_for(seed, step, 1)) - 1
        optimizer.zero_grad(set_to_none=True)
        loss_of(network, chosen, shares).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        beat()
    return network.eval().requires_grad_(False)


def _rounds(count: int, seed: int) -> Iterator[int]:
    """Yield indices of all images, reshuffled every epoch."""
    round_ = 0
    while True:
        yield from torch.randperm(count, generator=generator_for(seed, round_, 2)).tolist()
        round_ += 1


def images_per_step(patch_size: Sequence[int]) -> int:
    """Number of images per step within `VOXELS_PER_STEP`."""
    return max(FEWEST_IMAGES, min(MOST_IMAGES, VOXELS_PER_STEP // torch.Size(patch_size).numel()))


def shifted(images: Tensor, shares: Tensor) -> Tensor:
    """Shift every image by whole voxels, with reflection at the borders.

    Args:
        images: (N, C, *S).
        shares: (N, D) in [-1, 1], relative to the largest shift (`SHIFT` times the size).
    """
    for axis, size in enumerate(images.shape[2:]):
        moves = (shares[:, axis] * round(SHIFT * size)).round().long()
        places = (torch.arange(size) - moves[:, None]).abs()
        places = torch.where(places >= size, 2 * (size - 1) - places, places)
        shape = [len(images), 1, *[1] * (images.ndim - 2)]
        shape[2 + axis] = size
        images = torch.take_along_dim(images, places.view(shape).to(images.device), 2 + axis)
    return images


def halvings(shape: Sequence[int], smallest: int, most: int) -> list[tuple[int, ...]]:
    """Strides of successive halvings, while the longest axis keeps at least ``smallest`` voxels.

    Axes no longer than half of the longest axis are not halved, so that thick slices are merged only once voxels are
    about isotropic.

    Args:
        shape: (D,) in voxels.
        smallest: smallest length of the longest axis.
        most: largest number of halvings.
    """
    size, strides = list(shape), list[tuple[int, ...]]()
    while len(strides) < most and max(size) >= 2 * smallest:
        strides.append(tuple(2 if 2 * n > max(size) else 1 for n in size))
        size = [n // stride for n, stride in zip(size, strides[-1])]
    return strides
