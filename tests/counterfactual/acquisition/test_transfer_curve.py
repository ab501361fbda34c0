"""The transfer curve against numpy.interp, and its properties for every normalisation."""

import numpy as np
import pytest
import torch

from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.acquisition.transfer_curve import apply_transfer_curve, draw_transfer_curve

SCHEMES = ["ZScoreNormalization", "CTNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
           "NoNormalization", "SomebodysOwnNormalization"]


def make_image(seed: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """(1, 60, 60) skewed intensities between ``low`` and ``high``."""
    share = torch.rand(1, 60, 60, generator=torch.Generator().manual_seed(seed)) ** (1 + seed % 3)
    return low + (high - low) * share


def curves(scheme, strength, gamma, noise=0.0, seed=1, image=None):
    """Curves of one image with one channel towards another one; numbers or lists of n numbers."""
    image = make_image(0) if image is None else image
    as_vector = lambda value: torch.as_tensor(value, dtype=torch.float32).reshape(-1)  # noqa: E731
    strength, gamma, noise = torch.broadcast_tensors(as_vector(strength), as_vector(gamma), as_vector(noise))
    targets = torch.stack([intensity_quantiles(make_image(seed + k)) for k in range(len(strength))])
    return draw_transfer_curve(intensity_quantiles(image), targets, strength, gamma, noise, (scheme,))


def test_values_between_the_knots_are_interpolated_as_numpy_does():
    x = torch.linspace(-1, 3, 65, dtype=torch.float64).expand(2, 1, -1)
    y = torch.randn(2, 1, 65, dtype=torch.float64).cumsum(-1)
    values = 4 * torch.rand(2, 1, 10, 11, dtype=torch.float64) - 1
    mapped = apply_transfer_curve(values, x, y)
    for n in range(2):
        expected = np.interp(values[n].numpy(), x[n, 0].numpy(), y[n, 0].numpy())
        np.testing.assert_allclose(mapped[n].numpy(), expected, atol=1e-12)


def test_outside_of_the_knots_the_curve_goes_on_with_its_mean_slope():
    x = torch.linspace(0, 2, 65, dtype=torch.float64).view(1, 1, -1)
    y = 1 + 3 * (x / 2) ** 2
    mapped = apply_transfer_curve(torch.tensor([[[-2.0, 0.0, 2.0, 4.0]]], dtype=torch.float64), x, y)
    torch.testing.assert_close(mapped, torch.tensor([[[-2.0, 1.0, 4.0, 7.0]]], dtype=torch.float64))


def test_equal_knots_return_exactly_the_same_numbers():
    x = torch.linspace(-1, 1, 65).view(1, 1, -1)
    values = 5 * torch.randn(1, 1, 50, 50)
    assert torch.equal(apply_transfer_curve(values, x, x.clone()), values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_matching_gamma_one_and_no_noise_is_exactly_the_identity(scheme):
    curve = curves(scheme, 0.0, 1.0)
    assert torch.equal(curve.x, curve.y)
    assert (curve.noise_sd == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_curves_never_descend(scheme):
    curve = curves(scheme, torch.linspace(0, 1, 12), torch.logspace(-0.7, 0.7, 12), 0.05)
    assert (curve.y.diff(dim=-1) >= 0).all()
    assert (curve.y[..., -1] > curve.y[..., 0]).all()


def test_full_matching_without_normalisation_gives_the_target_distribution():
    source, target = make_image(0), make_image(2)
    curve = curves("NoNormalization", 1.0, 1.0, seed=2)
    mapped = apply_transfer_curve(source[None], curve.x, curve.y)[0]
    torch.testing.assert_close(intensity_quantiles(mapped), intensity_quantiles(target), atol=0.02, rtol=0)


def test_half_the_matching_is_halfway_between_image_and_target():
    half, full = curves("NoNormalization", 0.5, 1.0), curves("NoNormalization", 1.0, 1.0)
    torch.testing.assert_close(half.y, (full.x + full.y) / 2, atol=0.02, rtol=0)


def test_a_gamma_curve_is_the_power_law_on_the_robust_range():
    curve = curves("NoNormalization", 0.0, 2.0)
    low, high = curve.x[..., :1], curve.x[..., -1:]
    expected = low + (high - low) * ((curve.x - low) / (high - low)) ** 2
    torch.testing.assert_close(curve.y, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_z_scored_images_keep_mean_and_standard_deviation_noise_included(noise):
    image = make_image(0)
    image = (image - image.mean()) / image.std()
    curve = curves("ZScoreNormalization", [0.3, 1.0, 0.0], [0.5, 2.0, 1.7], noise, image=image)
    mapped = apply_transfer_curve(image.expand(3, 1, 60, 60), curve.x, curve.y).flatten(1)
    spread = (mapped.var(1) + curve.noise_sd[:, 0] ** 2).sqrt()
    torch.testing.assert_close(mapped.mean(1), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(spread, torch.ones(3), atol=0.02, rtol=0)


def test_rescaled_images_keep_the_ends_of_their_range_and_the_bounds_zero_and_one():
    curve = curves("RescaleTo01Normalization", [0.9, 0.1], [0.5, 2.0])
    torch.testing.assert_close(curve.y[..., [0, -1]], curve.x[..., [0, -1]])
    assert curve.bounds.tolist() == [[[0, 1]], [[0, 1]]]


def test_bounds_are_those_of_the_table_for_ct_and_none_for_z_scores():
    table = intensity_quantiles(make_image(0))
    torch.testing.assert_close(curves("CTNormalization", 1.0, 1.0).bounds[0, 0], table[0, [0, -1]])
    assert curves("ZScoreNormalization", 1.0, 1.0).bounds.tolist() == [[[-torch.inf, torch.inf]]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
def test_constant_images_give_the_identity_and_finite_numbers(scheme, value):
    curve = curves(scheme, [1.0, 0.5], [2.0, 0.5], 0.1, image=torch.full((1, 8, 8), value))
    assert torch.equal(curve.x, curve.y)
    assert curve.x.isfinite().all() and (curve.noise_sd == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_constant_target_gives_finite_numbers(scheme):
    targets = torch.full((1, 1, 65), 0.3)
    one = torch.ones(1)
    curve = draw_transfer_curve(intensity_quantiles(make_image(0)), targets, one, one, 0.1 * one, (scheme,))
    assert all(part.isfinite().all() for part in (curve.x, curve.y, curve.noise_sd))
    assert (curve.y.diff(dim=-1) >= 0).all()


def test_a_large_share_of_equal_voxels_goes_to_the_mean_of_its_aims():
    image = torch.cat([torch.zeros(1, 40, 100), 0.5 + 0.5 * torch.rand(1, 60, 100)], dim=1)
    target = torch.rand(1, 100, 100)
    one = torch.ones(1)
    tables = intensity_quantiles(image), intensity_quantiles(target)
    curve = draw_transfer_curve(tables[0], tables[1][None], one, one, 0 * one, ("NoNormalization",))
    mapped = apply_transfer_curve(image[None], curve.x, curve.y)
    assert mapped[0, 0, 0, 0].item() == pytest.approx(0.2, abs=0.03)
