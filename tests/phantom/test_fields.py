"""Fields: coordinates, smooth random fields, correlated noise."""

import numpy as np
import pytest

from nnunet_cfcl.phantom.fields import blur, correlated_noise, cosine_field, freeze, pixel_centres, smoothstep


def test_pixel_centres_lie_symmetrically_half_a_pixel_inside_the_border():
    points = pixel_centres((2, 4))
    assert points.shape == (2, 2, 4)
    np.testing.assert_allclose(points[0, :, 0], [-0.5, 0.5])
    np.testing.assert_allclose(points[1, 0], [-0.75, -0.25, 0.25, 0.75])


@pytest.mark.parametrize("shape", [(7, 9), (4, 5, 6)])
def test_cosine_field_equals_its_sum_written_out(shape):
    rng, orders, dim = np.random.default_rng(0), 3, len(shape)
    coefficients = rng.standard_normal((orders,) * dim)
    expected, power = np.zeros(shape), 0.0
    points = pixel_centres(shape)
    for k in np.ndindex(*coefficients.shape):
        if not any(k):
            continue
        weight = 1.0 / (1.0 + sum(i * i for i in k))
        power += weight**2 * 0.5 ** sum(i > 0 for i in k)
        cosines = [np.cos(np.pi * i * (p + 1) / 2) for i, p in zip(k, points, strict=True)]
        expected += weight * coefficients[k] * np.prod(cosines, axis=0)
    np.testing.assert_allclose(cosine_field(coefficients, shape), expected / np.sqrt(power), atol=1e-12)


def test_cosine_field_has_unit_mean_square_over_many_draws():
    rng = np.random.default_rng(1)
    squares = [np.mean(cosine_field(rng.standard_normal((4, 4)), (24, 24)) ** 2) for _ in range(2000)]
    assert np.mean(squares) == pytest.approx(1.0, abs=0.06)


def test_cosine_field_is_the_same_function_at_twice_the_resolution():
    coefficients = np.random.default_rng(2).standard_normal((4, 4))
    coarse, fine = cosine_field(coefficients, (32, 32)), cosine_field(coefficients, (64, 64))
    averaged = fine.reshape(32, 2, 32, 2).mean((1, 3))
    np.testing.assert_allclose(averaged, coarse, atol=0.02)


@pytest.mark.parametrize("sigma", [(0.7, 1.4), (0.0, 1.0), (2.0, 2.0)])
def test_correlated_noise_keeps_unit_variance_up_to_the_border(sigma):
    rng = np.random.default_rng(3)
    fields = np.stack([correlated_noise(rng.standard_normal((12, 10)), sigma) for _ in range(4000)])
    np.testing.assert_allclose(fields.var(0), 1.0, atol=0.15)
    assert fields.var() == pytest.approx(1.0, abs=0.02)


def test_correlated_noise_correlates_neighbours_and_zero_sigma_returns_the_white_field_itself():
    white = np.random.default_rng(4).standard_normal((200, 200))
    smooth = correlated_noise(white, (1.0, 1.0))
    # the autocorrelation of a Gaussian filter of width s at lag 1 is exp(-1 / (4 s^2))
    assert np.mean(smooth[1:] * smooth[:-1]) == pytest.approx(np.exp(-0.25), abs=0.03)
    assert correlated_noise(white, (0.0, 0.0)) is white


def test_blur_keeps_a_constant_and_the_sum_of_a_central_impulse():
    np.testing.assert_allclose(blur(np.full((9, 9), 0.3), (1.0, 2.0)), 0.3)
    impulse = np.zeros((31, 31))
    impulse[15, 15] = 1.0
    blurred = blur(impulse, (1.0, 0.0))
    assert blurred.sum() == pytest.approx(1.0)
    assert blurred[:, :15].sum() == 0.0


def test_smoothstep_is_clipped_and_symmetric_about_one_half():
    t = np.linspace(-0.5, 1.5, 21)
    np.testing.assert_allclose(smoothstep(t) + smoothstep(1.0 - t), 1.0)
    assert smoothstep(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_frozen_array_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        freeze(np.zeros(3))[0] = 1.0
