"""Masked autoencoding: exact shares, what the network sees, what the error counts."""

import pytest
import torch
from torch import nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining.objective import ImageViews
from nnunet_cfcl.pretraining.objectives.masked_autoencoder import MaskedAutoencoderObjective
from nnunet_cfcl.views import ViewGeometry

CPU = torch.device("cpu")


def draw(objective, views: int = 4, seed: int = 0) -> torch.Tensor:
    size = objective.patch_size
    matrices = torch.zeros(views, len(size), len(size) + 1)
    image = ImageViews(matrices, ViewGeometry(size, (1.0,) * len(size)), size, torch.zeros(2, len(size)))
    return objective.draw(torch.Generator().manual_seed(seed), image)["masks"]


def patch_masks(objective, masks: torch.Tensor) -> torch.Tensor:
    """(V, 1, *patch) of one image's draw."""
    return objective.inputs({"drawn": {"masks": masks[None]}}, [(0, view) for view in range(len(masks))], CPU)


@pytest.mark.parametrize("patch, block, ratio, masked", [
    ((16, 24), 8, 0.75, 4 / 6), ((16, 24), 8, 0.5, 3 / 6), ((8, 16, 16), 4, 0.75, 24 / 32),
    ((4, 32, 32), 8, 0.6, 10 / 16), ((16, 16), 8, 0.99, 3 / 4), ((16, 16), 8, 0.01, 1 / 4),
])
def test_the_same_share_of_every_view_is_masked_exactly_up_to_one_block(patch, block, ratio, masked):
    objective = MaskedAutoencoderObjective(patch, 1, ratio, block)
    masks = patch_masks(objective, draw(objective)).flatten(1)
    assert masks.double().mean(1).tolist() == pytest.approx([masked] * 4)


def test_blocks_divide_every_axis_evenly_whatever_its_length():
    objective = MaskedAutoencoderObjective((5, 28, 20), 1, 0.5, 8)
    assert objective.grid == (1, 4, 2)
    grid = torch.arange(8).view(1, 1, 4, 2)  # numbers in place of a mask show where each block lies
    numbers = objective.inputs({"drawn": {"masks": grid[None]}}, [(0, 0)], CPU)[0, 0]
    assert numbers.shape == (5, 28, 20)
    assert torch.bincount(numbers.flatten()).tolist() == [5 * 7 * 10] * 8
    assert torch.equal(numbers[2, 7:14, 10:], torch.full((7, 10), 3))


def test_masks_differ_between_views_and_follow_the_seed():
    objective = MaskedAutoencoderObjective((32, 32), 1, 0.5, 8)
    masks = draw(objective)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks, draw(objective)) and not torch.equal(masks, draw(objective, seed=1))


def test_rows_are_image_and_view():
    objective = MaskedAutoencoderObjective((16, 16), 1, 0.5, 8)
    masks = torch.stack([draw(objective, seed=seed) for seed in range(3)])
    found = objective.inputs({"drawn": {"masks": masks}}, [(2, 1), (0, 3)], CPU)
    assert torch.equal(found[:, 0, ::8, ::8], torch.stack([masks[2, 1], masks[0, 3]]))


class Recorder(nn.Module):
    """Gives a map of free parameters and keeps what it was shown."""

    def __init__(self, width: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, width, *size, generator=torch.Generator().manual_seed(5)))

    def forward(self, images):
        self.seen = images
        return self.map.expand(len(images), *self.map.shape[1:])


@pytest.mark.parametrize("size", [(8, 12), (8, 4, 8)])
def test_the_error_is_that_of_the_masked_voxels_alone(size):
    objective = MaskedAutoencoderObjective(size, 2, 0.34, 4)
    network = Recorder(3, size)
    model = objective.build_model(network, 3, PretrainSettings()).double()
    images = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    masks = patch_masks(objective, draw(objective, views=2))
    value, statistics = objective.loss(model, model(images, masks), {})
    predicted = model.reconstruct(network.map)[0]
    squares = [
        (predicted[c][tuple(place)] - images[n, c][tuple(place)]) ** 2
        for n in range(2) for place in masks[n, 0].nonzero() for c in range(2)
    ]
    torch.testing.assert_close(value, sum(squares) / len(squares))
    assert statistics == {}
    value.backward()
    never_masked = ~masks.any(0)[0]
    assert never_masked.any() and (network.map.grad[0][:, never_masked] == 0).all()
    assert (network.map.grad[0][:, ~never_masked] != 0).all()
    with torch.no_grad():
        network.map[0][:, never_masked] += 1
    torch.testing.assert_close(model(images, masks).mean(), value, rtol=0, atol=0)


def test_the_network_is_shown_zeros_where_masked_and_the_view_elsewhere():
    objective = MaskedAutoencoderObjective((8, 8), 2, 0.5, 4)
    network = Recorder(3, (8, 8))
    model = objective.build_model(network, 3, PretrainSettings())
    images, masks = torch.randn(4, 2, 8, 8) + 10, patch_masks(objective, draw(objective))
    model(images, masks)
    hidden = masks.expand_as(images)
    assert (network.seen[hidden] == 0).all() and torch.equal(network.seen[~hidden], images[~hidden])
    assert images.min() > 1, "the target must stay whole"


def test_a_patch_of_a_single_block_is_rejected_with_the_setting_to_change():
    words = (r"\[8, 16\] is a single block of baseline.mask_block 64 voxels, masked autoencoding needs at least 2; "
             "fix: set baseline.mask_block to at most 8")
    with pytest.raises(UserError, match=words):
        MaskedAutoencoderObjective((8, 16), 1, 0.75, 64)
    assert MaskedAutoencoderObjective((8, 16), 1, 0.75, 8).grid == (1, 2)
