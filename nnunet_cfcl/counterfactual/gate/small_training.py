"""What the small networks that judge a generator share: how they are trained in a minute, and on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.runs.watchdog import beat, watched

#: Voxels that a step sees; with larger images it has fewer of them, within these bounds.
VOXELS_PER_STEP = 1 << 20
FEWEST_IMAGES, MOST_IMAGES = 4, 16
#: Images are moved by up to this share of their size.
SHIFT = 0.05

Network = TypeVar("Network", bound=nn.Module)


@watched("training of a judge")
def train_briefly(
    build: Callable[[], Network], count: int, loss_of: Callable[[Network, Tensor, Tensor], Tensor], steps: int,
    images_per_step: int, dim: int, seed: int, device: torch.device, peak_lr: float = 2e-3,
) -> Network:
    """A network trained by AdamW, with a short warm-up and a linear decay; the same for the same arguments.

    It is watched, see `runs.watchdog.watched`.

    Args:
        build: makes it.
        count: of images there are.
        loss_of: (network, indices (B,) of images, shares (B, D) in [-1, 1] by which to move them) -> scalar.
        steps: of the optimiser.
        images_per_step: B.
        dim: D.
        seed: of the initialisation and of all draws.
        device: where it is trained.
        peak_lr: highest learning rate.

    Returns:
        The network, on the device, in evaluation mode, with parameters that want no gradient.
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
    """Rounds through all images, in a new order each."""
    round_ = 0
    while True:
        yield from torch.randperm(count, generator=generator_for(seed, round_, 2)).tolist()
        round_ += 1


def images_per_step(patch_size: Sequence[int]) -> int:
    """As many as `VOXELS_PER_STEP` allows."""
    return max(FEWEST_IMAGES, min(MOST_IMAGES, VOXELS_PER_STEP // torch.Size(patch_size).numel()))


def shifted(images: Tensor, shares: Tensor) -> Tensor:
    """Images moved by whole voxels, each by its own; what comes in at a border is the reflection of what is there.

    Args:
        images: (N, C, *S).
        shares: (N, D) in [-1, 1], of the largest move, which is `SHIFT` of the size.
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
    """Strides of successive halvings, until the longest axis would get shorter than ``smallest`` voxels; axes that are
    no longer than half the longest wait, so that thick slices are not merged before their voxels are about cubes.

    Args:
        shape: (D,) in voxels.
        smallest: length that is kept.
        most: halvings at most.
    """
    size, strides = list(shape), list[tuple[int, ...]]()
    while len(strides) < most and max(size) >= 2 * smallest:
        strides.append(tuple(2 if 2 * n > max(size) else 1 for n in size))
        size = [n // stride for n, stride in zip(size, strides[-1])]
    return strides
