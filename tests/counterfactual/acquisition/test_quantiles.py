"""The quantile table against numpy."""

import numpy as np
import torch

from nnunet_cfcl.counterfactual import intensity_quantiles


def test_the_table_holds_numpy_quantiles_at_the_middle_of_equal_shares():
    image = np.random.default_rng(0).gamma(2.0, size=(2, 9, 12, 7)).astype(np.float32)
    table = intensity_quantiles(image, count=5)
    expected = np.quantile(image.reshape(2, -1), [0.1, 0.3, 0.5, 0.7, 0.9], axis=1).T
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-5)


def test_arrays_and_tensors_give_the_same_table():
    image = np.random.default_rng(1).normal(size=(1, 20, 30))
    torch.testing.assert_close(intensity_quantiles(image), intensity_quantiles(torch.from_numpy(image)))


def test_a_large_image_is_sampled_evenly_over_all_of_its_axes():
    ramps = np.stack(np.broadcast_arrays(*np.ogrid[0:1:300j, 0:1:80j, 0:1:90j])).astype(np.float32)
    table = intensity_quantiles(ramps)
    expected = torch.linspace(0.5 / 65, 64.5 / 65, 65).expand(3, 65)
    torch.testing.assert_close(table, expected, atol=0.03, rtol=0)


def test_mean_and_standard_deviation_of_the_table_are_close_to_those_of_the_image():
    image = np.random.default_rng(2).normal(3.0, 2.0, size=(1, 40, 40, 40))
    table = intensity_quantiles(image)
    assert abs(table.mean() - 3) < 0.03
    assert abs(table.std(correction=0) - 2) < 0.05


def test_one_outlier_does_not_move_the_ends_of_the_range():
    image = np.random.default_rng(3).random((1, 50, 50))
    spiked = image.copy()
    spiked[0, 7, 7] = 1e6
    torch.testing.assert_close(intensity_quantiles(spiked), intensity_quantiles(image), atol=0.01, rtol=0)


def test_only_voxels_inside_count_and_an_empty_mask_counts_as_none():
    image, inside = np.zeros((1, 10, 10), np.float32), np.zeros((10, 10), bool)
    image[:, :3], inside[:3] = 5, True
    assert (intensity_quantiles(image, inside=inside) == 5).all()
    torch.testing.assert_close(intensity_quantiles(image, inside=inside & False), intensity_quantiles(image))
