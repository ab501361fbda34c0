"""Metrics of pairs of images against closed forms and scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import wasserstein_distance

from nnunet_cfcl.counterfactual.gate.image_pairs import (
    changed_share,
    channel_std,
    edge_strength,
    intensity_distance,
    mean_change,
    structure_agreement,
)


def blobs(count: int, seed: int, shape: tuple[int, ...] = (40, 40), channels: int = 1) -> torch.Tensor:
    """Smooth random images (N, C, *shape)."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(count, channels, *shape))
    return torch.tensor(ndimage.gaussian_filter(images, (0, 0, *[3] * len(shape))) * 10, dtype=torch.float32)


def test_the_standard_deviation_is_that_of_every_channel_and_one_for_a_constant_channel():
    images = torch.stack([torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.full((4,), 5.0)])[None].view(1, 2, 2, 2)
    assert channel_std(images).tolist() == [1, 1]
    torch.testing.assert_close(channel_std(10 * images), torch.tensor([10.0, 1.0]))


def test_changes_are_measured_in_standard_deviations_of_their_channel():
    one = torch.zeros(2, 2, 2, 2)
    other = one.clone()
    other[:, 0] += 1
    other[0, 1, 0, 0] += 40
    spread = torch.tensor([2.0, 100.0])
    assert mean_change(one, other, spread) == pytest.approx((8 * 0.5 + 0.4) / 16)
    assert mean_change(one, one, spread) == 0
    # channel 0 moves everywhere by half a standard deviation, channel 1 in one voxel of eight by 0.4
    assert changed_share(one, other, spread) == 1
    assert changed_share(one, other, torch.tensor([20.0, 100.0])) == pytest.approx(1 / 8)


@pytest.mark.parametrize("shape", [(40, 40), (8, 24, 24)])
def test_structure_agrees_perfectly_with_itself_brighter_or_inverted(shape):
    images = blobs(3, 0, shape, 2)
    for other in (images, 5 + 3 * images, -2 * images):
        found = structure_agreement(edge_strength(images), edge_strength(other))
        torch.testing.assert_close(found, torch.ones(3, dtype=torch.float64))


def test_structure_is_the_correlation_of_gradient_magnitudes():
    one, other = blobs(2, 0, (12, 14), 2), blobs(2, 1, (12, 14), 2)

    def edges(image: torch.Tensor) -> np.ndarray:
        return ndimage.gaussian_gradient_magnitude(image.numpy(), 1.0, mode="nearest").ravel()

    expected = [np.mean([np.corrcoef(edges(a), edges(b))[0, 1] for a, b in zip(x, y)]) for x, y in zip(one, other)]
    np.testing.assert_allclose(structure_agreement(edge_strength(one), edge_strength(other)), expected, rtol=1e-4)


def test_structure_agrees_less_the_farther_the_anatomy_is_moved_and_hardly_between_two_patients():
    images = blobs(10, 0)
    edges = edge_strength(images)
    moved = [float(structure_agreement(edges, edge_strength(images.roll((k, k), (2, 3)))).mean()) for k in (0, 1, 2, 4)]
    assert moved == sorted(moved, reverse=True) and moved[0] > 0.99 and moved[3] < 0.5
    assert abs(float(structure_agreement(edges, edge_strength(blobs(10, 1))).mean())) < 0.2


def test_structure_is_averaged_over_channels_that_have_some_and_unknown_without_one():
    images = blobs(2, 0, channels=2)
    flat = images.clone()
    flat[0, 1] = 3
    flat[1] = 3
    found = structure_agreement(edge_strength(images), edge_strength(flat))
    assert float(found[0]) == pytest.approx(1) and found[1].isnan()


def test_the_distance_of_intensities_is_scipys_in_standard_deviations():
    random = np.random.default_rng(0)
    one, other = random.normal(0, 1, (6, 2, 20, 20)), random.gamma(2, 1, (9, 2, 20, 20))
    spread = torch.tensor([2.0, 0.5])
    expected = np.mean([wasserstein_distance(one[:, c].ravel(), other[:, c].ravel()) / float(spread[c])
                        for c in range(2)])
    found = intensity_distance(torch.tensor(one), torch.tensor(other), spread)
    assert found == pytest.approx(expected, rel=0.02)


def test_groups_that_are_shifted_are_as_far_apart_as_the_shift_and_order_does_not_matter():
    images = blobs(4, 0)
    spread = channel_std(images)
    shifted = images + 0.7 * spread
    assert intensity_distance(images, shifted, spread) == pytest.approx(0.7, rel=1e-4)
    assert intensity_distance(images, shifted.flip(0).transpose(2, 3), spread) == pytest.approx(0.7, rel=1e-4)


def test_differences_between_the_patients_of_a_group_are_no_distance():
    """Bright and dark patients in both groups, in another order."""
    images = blobs(4, 0) * 0.01 + torch.tensor([0.0, 1.0, 2.0, 3.0]).view(-1, 1, 1, 1)
    assert intensity_distance(images, images.flip(0), torch.ones(1)) == pytest.approx(0, abs=1e-6)
