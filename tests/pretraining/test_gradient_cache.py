"""Gradient caching: many small passes give the gradients of one large batch."""

import pytest
import torch
from torch import nn

from nnunet_cfcl.errors import NotSupported
from nnunet_cfcl.losses import dvd_cl_loss
from nnunet_cfcl.pretraining.gradient_cache import backward_with_cache, check_norms


def _gradients(network: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in network.parameters()]


def _network() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(100, 6)).double()


def _contrast(embeddings: torch.Tensor) -> torch.Tensor:
    a, b = embeddings.view(2, 1, -1, 6)
    return dvd_cl_loss(a, b).loss


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_cached_gradients_equal_those_of_one_big_batch(size):
    network, images = _network(), torch.randn(8, 1, 7, 7, dtype=torch.float64)
    whole = backward_with_cache(network, [images], _contrast, images.device)
    expected = _gradients(network)
    network.zero_grad()
    cached = backward_with_cache(network, images.split(size), _contrast, images.device)
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-10)
    for found, wanted in zip(_gradients(network), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-10)


def test_the_second_pass_replays_the_random_state_of_the_first():
    seen: list[torch.Tensor] = []
    weight = torch.ones(3, requires_grad=True)

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(3)
        seen.append(noise)
        return (chunk * weight * noise)[None]

    torch.manual_seed(1)
    backward_with_cache(encode, [torch.ones(3), torch.ones(3)], lambda e: e.sum(), weight.device)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(weight.grad, seen[0] + seen[1])


def test_the_random_state_afterwards_is_that_of_the_first_pass():
    weight = torch.ones(1, requires_grad=True)
    torch.manual_seed(1)
    backward_with_cache(lambda c: (weight * torch.rand(1))[None], [0, 1], lambda e: e.sum(), weight.device)
    after = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(2)
    assert torch.equal(after, torch.rand(1))


def test_a_scaled_loss_scales_the_gradients_and_not_the_value():
    weight = torch.ones(1, requires_grad=True)
    value = backward_with_cache(
        lambda chunk: (weight * chunk)[None], [2.0, 3.0], lambda e: e.sum(), weight.device, lambda loss: 8 * loss
    )
    assert (value.item(), weight.grad.item()) == (5, 40)


def test_batch_norm_is_rejected_and_named():
    with pytest.raises(NotSupported, match=r"BatchNorm3d at '1'.*patches_per_pass"):
        check_norms(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)))
    check_norms(nn.Sequential(nn.InstanceNorm3d(2), nn.GroupNorm(1, 2)))
