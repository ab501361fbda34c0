"""Weights of windows, and planes that are dropped."""

import torch

from nnunet_cfcl.views.blending import forget_planes, outer_shares


def test_a_windows_weight_is_the_product_of_its_shares():
    z, y, x = torch.rand(2), torch.rand(3), torch.rand(4)
    found = outer_shares([(z, y, x), (1 - z, y, x)], torch.device("cpu"))
    assert found.shape == (2, 1, 2, 3, 4)
    torch.testing.assert_close(found[0, 0], torch.einsum("i,j,k->ijk", z, y, x))
    torch.testing.assert_close(found[:, 0].sum(0), torch.einsum("j,k->jk", y, x).expand(2, -1, -1))


def test_planes_behind_the_dropped_ones_move_up_and_zeros_follow():
    sums = torch.arange(1.0, 31.0).view(2, 5, 3)
    for count in range(6):
        found = sums.clone()
        forget_planes(found, 1, count)
        assert torch.equal(found, torch.cat([sums[:, count:], torch.zeros(2, count, 3)], 1))
