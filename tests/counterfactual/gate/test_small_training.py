"""Shifts, strides, draws and the short training of the judging networks."""

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_cfcl.counterfactual.gate.small_training import SHIFT, halvings, images_per_step, shifted, train_briefly

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(40, 21), (20, 40, 60)])
def test_every_image_moves_by_its_own_share_and_the_border_is_reflected(shape):
    random = np.random.default_rng(0)
    images = random.normal(size=(3, 2, *shape))
    shares = torch.tensor(random.uniform(-1, 1, (3, len(shape))))
    found = shifted(torch.from_numpy(images), shares).numpy()
    for n in range(3):
        moves = [round(float(share) * round(SHIFT * size)) for share, size in zip(shares[n], shape)]
        padded = np.pad(images[n], [(0, 0), *[(4, 4)] * len(shape)], mode="reflect")
        inside = tuple(slice(4 - move, 4 - move + size) for move, size in zip(moves, shape))
        np.testing.assert_array_equal(found[n], padded[(slice(None), *inside)])
    assert any(abs(round(float(s) * round(SHIFT * n))) for s, n in zip(shares[0], shape))


def test_images_that_are_not_moved_stay_as_they_are_and_keep_their_gradient():
    images = torch.randn(2, 1, 30, 30, requires_grad=True)
    still = shifted(images, torch.zeros(2, 2))
    assert torch.equal(still, images)
    still.sum().backward()
    assert torch.equal(images.grad, torch.ones_like(images))


@pytest.mark.parametrize("shape, smallest, most, expected", [
    ((96, 96), 6, 6, [(2, 2)] * 4),
    ((96, 96), 6, 2, [(2, 2)] * 2),
    ((16, 320, 320), 6, 6, [(1, 2, 2)] * 4 + [(2, 2, 2)]),
    ((40, 56, 56), 6, 6, [(2, 2, 2)] * 3),
    ((8, 8), 6, 6, []),
])
def test_axes_are_halved_until_voxels_are_about_cubes_and_the_longest_is_short(shape, smallest, most, expected):
    assert halvings(shape, smallest, most) == expected


@pytest.mark.parametrize("shape, expected", [((96, 96), 16), ((512, 512), 4), ((128, 128, 128), 4), ((40, 56, 56), 8)])
def test_large_images_come_in_smaller_batches(shape, expected):
    assert images_per_step(shape) == expected


def regression(seed: int, seen: list[torch.Tensor] | None = None) -> nn.Linear:
    """A linear model trained on points of slope 3."""
    x = torch.linspace(-1, 1, 10)[:, None]

    def loss_of(network, chosen, shares):
        assert shares.shape == (5, 2) and shares.abs().max() <= 1
        if seen is not None:
            seen.append(chosen)
        return (network(x[chosen]) - 3 * x[chosen]).pow(2).mean()

    return train_briefly(lambda: nn.Linear(1, 1), 10, loss_of, 400, 5, 2, seed, CPU, 0.05)


def test_a_short_training_learns_and_returns_a_frozen_network():
    network = regression(0)
    assert float(network.weight) == pytest.approx(3, abs=0.1) and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_every_image_is_seen_once_in_a_round_and_rounds_differ():
    seen: list[torch.Tensor] = []
    regression(0, seen)
    rounds = torch.cat(seen).view(-1, 10)
    assert (rounds.sort(1).values == torch.arange(10)).all() and not torch.equal(rounds[0], rounds[1])


def test_the_same_seed_gives_the_same_network_and_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = regression(1), regression(1), regression(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
