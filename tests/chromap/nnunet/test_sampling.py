"""Voxels drawn for the colour space, and the features read there."""

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_cfcl.chromap.nnunet.sampling import CaseInMemory, draw_patches, draw_voxels, sample_features
from nnunet_cfcl.errors import UserError

CPU = torch.device("cpu")


class Coordinates(nn.Module):
    """Looks like nnU-Net's network; its last decoder map is the image and its square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dim == 2 else nn.Conv3d
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([conv(2, 3, 1)])
        self.decoder.deep_supervision = True

    def forward(self, x):
        return self.decoder.seg_layers[-1](torch.cat([x, x ** 2], 1))


class Labelled(CaseInMemory):
    def __init__(self, name, data, labels):
        super().__init__(name, data)
        self._labels = labels

    def labels(self, box):
        return self._labels[box]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("patch", [(8, 10), (6, 8, 10)])
def test_features_are_those_of_the_voxels_and_the_network_is_as_before(patch):
    data = np.random.default_rng(0).normal(size=(1, 12, 20, 24)).astype(np.float32)
    network = Coordinates(len(patch)).train()
    layer = network.decoder.seg_layers[-1]
    found = sample_features(network, [CaseInMemory("a", data)] * 3, 3, patch, 600, 0, CPU)
    # six patches with at most a hundred voxels each; half of a patch's sides is away from its borders
    assert 100 < len(found) <= 600 and found.shape[1] == 2
    assert torch.equal(found[:, 1], found[:, 0] ** 2)
    assert np.isin(found[:, 0].numpy(), data).all()
    assert network.training and network.decoder.seg_layers[-1] is layer and network.decoder.deep_supervision
    assert torch.equal(found, sample_features(network, [CaseInMemory("a", data)] * 3, 3, patch, 600, 0, CPU))


def test_padding_is_never_sampled():
    data = np.full((1, 1, 5, 6), 7, np.float32)
    found = sample_features(Coordinates(2), [CaseInMemory("a", data)], 1, (16, 16), 400, 0, CPU)
    assert len(found) and (found[:, 0] == 7).all()


def test_every_class_of_a_patch_gives_as_many_voxels():
    labels = np.zeros((16, 16), np.int16)
    labels[4:8, 4:8], labels[10:13, 8:12], labels[:2] = 1, 2, -1
    chosen = draw_voxels(labels, np.ones((16, 16), bool), 30, generator()).numpy()
    assert sorted(np.unique(labels.ravel()[chosen], return_counts=True)[1]) == [10, 10, 10]


def test_the_first_patch_holds_a_labelled_voxel():
    labels = np.zeros((20, 40, 40), np.int16)
    labels[17, 5, 36] = 3
    case = Labelled("a", np.zeros((1, 20, 40, 40), np.float32), labels)
    for seed in range(5):
        patch, size, own, inner = next(iter(draw_patches(case, (8, 8, 8), generator(seed))))
        assert patch.shape == (1, 8, 8, 8) and (own == 3).sum() == 1 and inner.any()


def test_no_cases_are_an_error():
    with pytest.raises(UserError, match="no cases"):
        sample_features(Coordinates(2), [], 0, (8, 8), 10, 0, CPU)
