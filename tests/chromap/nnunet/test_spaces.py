"""The colour space that a training leaves behind, and which one a prediction takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import nn

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.nnunet.spaces import evenly, fit_after_training, load_named, load_own, weights_digest
from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.errors import UserError


class Network(nn.Module):
    """Looks like nnU-Net's; its last decoder map is the image, its square and its cube."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(3, 2, 1)])
        self.decoder.deep_supervision = True

    def forward(self, x):
        return self.decoder.seg_layers[-1](torch.cat([x, x ** 2, x ** 3], 1))


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def fold(tmp_path):
    """What `fit_after_training` reads of a fold: one case whose ignored half has intensities of its own."""
    random = np.random.default_rng(0)
    image = random.normal(size=(1, 1, 40, 40)).astype(np.float32)
    labels = np.zeros((1, 1, 40, 40), np.int8)
    labels[..., 10:20, :20], labels[..., 20:] = 1, 2
    image[..., 20:] += 100
    nnUNetDatasetBlosc2.save_case(image, labels, {}, str(tmp_path / "case"), chunks=image.shape, blocks=image.shape)
    settings = resolve_settings({"chromap": {"reducer": "pca", "samples": 400}})
    return SimpleNamespace(
        settings=settings, device=torch.device("cpu"), split=lambda: (["case"], []), preprocessed=tmp_path,
        folder=tmp_path / "fold_0", configuration=SimpleNamespace(patch_size=(40, 40)),
        labels=SimpleNamespace(ignore_label=2))


def test_the_space_is_fitted_on_the_trained_weights_and_no_ignored_voxel(fold, network):
    space = ColorSpace.load(fit_after_training(fold, network))
    assert space.identity == weights_digest(network.state_dict()) and space.features == 3
    # had it seen intensities of 100, those of -1 and 1 would lie at one place
    low, high = (space.place(space.reduce(torch.tensor([[x], [x ** 2], [x ** 3]]))) for x in (-1.0, 1.0))
    assert torch.linalg.vector_norm(high - low) > 0.2


def test_only_a_space_of_the_same_weights_is_taken(fold, network, tmp_path):
    file = fit_after_training(fold, network)
    identity = weights_digest(network.state_dict())
    assert load_own(file, identity) is not None and load_own(file, "other") is None
    assert load_named(file, network, identity).identity == identity
    with pytest.raises(UserError, match="another model.*leave --space out"):
        load_named(file, network, "other")
    with pytest.raises(UserError, match="no colour space"):
        load_named(tmp_path / "nowhere.npz", network, identity)
    file.write_bytes(b"damaged")
    assert load_own(file, identity) is None


def test_names_are_chosen_from_the_first_to_the_last():
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9] and evenly([1, 2], 5) == [1, 2] and evenly([], 3) == []
