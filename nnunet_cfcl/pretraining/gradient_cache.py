"""A contrastive step whose batch is larger than memory (Gao et al. 2021, arXiv 2101.06983, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from nnunet_cfcl.errors import NotSupported

Chunk = TypeVar("Chunk")


def backward_with_cache(
    encode: Callable[[Chunk], Tensor],
    chunks: Sequence[Chunk],
    loss: Callable[[Tensor], Tensor],
    device: torch.device,
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Gradients of ``loss(cat(encode(chunk) for chunk in chunks))`` with one chunk's graph in memory at a time.

    With one chunk it is the ordinary forward and backward pass. With more, every chunk is first encoded without a
    graph, the exact loss gives the gradient at every embedding, and each chunk is encoded again, under the random
    state of its first time, to send that gradient on to the parameters.

    Args:
        encode: chunk -> embeddings (M, d); must not mix samples of different chunks (no batch norm).
        chunks: what ``encode`` takes, in the order of the embeddings.
        loss: all embeddings -> scalar.
        device: where ``encode`` runs; its random state is replayed.
        scale: applied to the loss before the backward pass (AMP's gradient scaler).

    Returns:
        The detached loss, not scaled.
    """
    if len(chunks) == 1:
        value = loss(encode(chunks[0]))
        scale(value).backward()
        return value.detach()
    embeddings, states = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(device))
            embeddings.append(encode(chunk))
    sizes = [len(part) for part in embeddings]
    leaf = torch.cat(embeddings).requires_grad_()
    value = loss(leaf)
    scale(value).backward()
    assert leaf.grad is not None
    after = _random_state(device)
    for chunk, state, gradient in zip(chunks, states, leaf.grad.split(sizes), strict=True):
        _set_random_state(state, device)
        encode(chunk).backward(gradient)
    _set_random_state(after, device)
    return value.detach()


def check_norms(network: nn.Module) -> None:
    """Reject norms that mix the samples of a batch: with cached gradients they would see other batches.

    Raises:
        NotSupported: names the first such layer.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise NotSupported(
                f"{type(module).__name__} at '{name}' mixes the samples of a batch, and pretraining encodes its images "
                "in several passes",
                "use a plan with instance norm, or set pretrain.patches_per_pass to at least images_per_step x views, "
                "so that one pass of one process holds them all"
            )


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), accelerator


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
