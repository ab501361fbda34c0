"""Analytic acquisitions: each effect alone against an oracle, all effects together by their properties."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import default_collate

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual import AcquisitionParameters, apply_acquisition, draw_acquisition, intensity_quantiles
from nnunet_cfcl.counterfactual.acquisition.bias_field import log_bias_field

OFF = AcquisitionSettings(probability=0.0)
NOTHING = {"matching": (0.0, 0.0), "gamma": (1.0, 1.0), "point_spread": (0.0, 0.0), "noise_level": (0.0, 0.0),
           "noise_correlation": (0.0, 0.0), "bias_field": (0.0, 0.0)}
SHAPES = {2: (30, 41), 3: (18, 22, 20)}


def only(**effects) -> AcquisitionSettings:
    """Settings with these effects always on and the others without any strength."""
    return AcquisitionSettings(probability=1.0, **{**NOTHING, **effects})


def make_image(dim: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    """(C, *S) z-scored smooth blobs."""
    noise = np.random.default_rng(seed).normal(size=(channels, *SHAPES[dim]))
    smooth = np.stack([gaussian_filter(channel, 2.0) for channel in noise])
    return torch.tensor((smooth - smooth.mean()) / smooth.std(), dtype=torch.float32)


def draw(settings, image, count, seed=0, scheme="ZScoreNormalization") -> AcquisitionParameters:
    table = intensity_quantiles(image)
    others = [image.sign() * image.abs() ** (1 + 0.2 * (k % 8)) for k in range(count)]
    targets = torch.stack([intensity_quantiles(other) for other in others])
    generator = torch.Generator().manual_seed(seed)
    return draw_acquisition(generator, settings, table, targets, image.ndim - 1, (scheme,) * image.shape[0], count)


def acquire(settings, image, count=4, spacing=None, seed=0, scheme="ZScoreNormalization", inside=None):
    parameters = draw(settings, image, count, seed, scheme)
    images = image.expand(count, *image.shape)
    return apply_acquisition(images, parameters, spacing or (1.0,) * (image.ndim - 1), inside), parameters


def rows(parameters: AcquisitionParameters, index: slice) -> AcquisitionParameters:
    return AcquisitionParameters(*(field[index] for field in parameters))


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "CTNormalization", "RescaleTo01Normalization"])
def test_with_every_effect_off_the_image_comes_back_exactly(dim, scheme):
    image = make_image(dim, channels=2)
    acquired, _ = acquire(OFF, image, scheme=scheme)
    assert torch.equal(acquired, image.expand_as(acquired))
    acquired, _ = acquire(only(), image, scheme=scheme)
    assert torch.equal(acquired, image.expand_as(acquired))


@pytest.mark.parametrize("dim", [2, 3])
def test_all_effects_together_keep_the_shape_are_finite_and_differ_from_each_other(dim):
    image = make_image(dim, channels=2)
    acquired, _ = acquire(AcquisitionSettings(probability=1.0), image, count=5)
    assert acquired.shape == (5, *image.shape) and acquired.dtype == image.dtype
    assert acquired.isfinite().all()
    flat = acquired.flatten(1)
    assert (torch.cdist(flat, flat) + 1e9 * torch.eye(5)).min() > 1


@pytest.mark.parametrize("dim", [2, 3])
def test_a_batch_equals_its_images_one_by_one(dim):
    settings = AcquisitionSettings(probability=1.0)
    images = torch.stack([make_image(dim, seed) for seed in range(3)])
    parameters = draw(settings, images[0], 3)
    spacing = (2.0, 1.0, 1.0)[:dim]
    batch = apply_acquisition(images, parameters, spacing)
    for n in range(3):
        alone = apply_acquisition(images[n : n + 1], rows(parameters, slice(n, n + 1)), spacing)
        torch.testing.assert_close(batch[n : n + 1], alone, atol=1e-5, rtol=1e-5)


def test_the_same_seed_draws_and_applies_the_same_and_another_seed_does_not():
    image = make_image(2)
    settings = AcquisitionSettings(probability=1.0)
    first, again = acquire(settings, image, seed=7)[0], acquire(settings, image, seed=7)[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, acquire(settings, image, seed=8)[0])


def test_the_global_random_state_is_neither_read_nor_changed():
    state = torch.get_rng_state()
    acquire(AcquisitionSettings(probability=1.0), make_image(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_later_random_numbers_do_not_depend_on_which_effects_are_on():
    image, following = make_image(2), []
    for settings in (OFF, AcquisitionSettings(probability=1.0)):
        generator = torch.Generator().manual_seed(3)
        table = intensity_quantiles(image)
        draw_acquisition(generator, settings, table, table[None], 2, ("NoNormalization",), 1)
        following.append(torch.rand(1, generator=generator).item())
    assert following[0] == following[1]


def test_collating_the_parameters_of_two_images_stacks_them():
    image = make_image(3)
    batch = default_collate([draw(AcquisitionSettings(), image, 3, seed) for seed in range(2)])
    assert isinstance(batch, AcquisitionParameters)
    assert batch.curve_y.shape == (2, 3, 1, 65) and batch.noise_seed.dtype == torch.int64
    assert batch.bias_field.shape == (2, 3, 4, 4, 4)


def test_effects_are_on_with_the_probability_and_lie_in_the_ranges_of_the_settings():
    settings = AcquisitionSettings(probability=0.4, point_spread=(0.5, 1.0), noise_correlation=(0.2, 0.6))
    parameters = draw(settings, make_image(2), 2000)
    for field, interval in ((parameters.point_spread, (0.5, 1.0)), (parameters.noise_correlation, (0.2, 0.6))):
        on = field[field > 0]
        assert abs(len(on) / 2000 - 0.4) < 0.05
        assert interval[0] <= on.min() < interval[0] + 0.02 and interval[1] - 0.02 < on.max() <= interval[1]
    assert abs((parameters.bias_field.flatten(1) != 0).any(1).float().mean() - 0.4) < 0.05


def test_the_point_spread_is_scipy_s_gaussian_and_isotropic_in_millimetres():
    image = make_image(3)
    acquired, _ = acquire(only(point_spread=(1.2, 1.2)), image, count=1, spacing=(3.0, 1.0, 1.5),
                          scheme="NoNormalization")
    blur = lambda a: gaussian_filter(a, (0.4, 1.2, 0.8), mode="constant", truncate=12)  # noqa: E731
    expected = blur(image[0].double().numpy()) / blur(np.ones(SHAPES[3]))
    np.testing.assert_allclose(acquired[0, 0].numpy(), expected, atol=1e-5)


def test_the_bias_field_multiplies_the_signal_above_the_low_end_of_the_range():
    image = make_image(2)
    acquired, parameters = acquire(only(bias_field=(0.4, 0.4)), image, count=1, scheme="NoNormalization")
    floor = intensity_quantiles(image)[0, 0]
    expected = floor + (image - floor) * log_bias_field(parameters.bias_field, image.shape[1:]).exp()
    torch.testing.assert_close(acquired[0], expected)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_the_noise_has_its_level_everywhere_and_its_correlation(dim, correlation):
    image = make_image(dim)
    settings = only(noise_level=(0.05, 0.05), noise_correlation=(correlation, correlation))
    acquired, parameters = acquire(settings, image, count=200, scheme="NoNormalization")
    table = intensity_quantiles(image)
    noise = (acquired - image).squeeze(1)
    level = 0.05 * (table[0, -1] - table[0, 0])
    torch.testing.assert_close(parameters.noise_sd, level.expand(200, 1))
    torch.testing.assert_close(noise.std(0).mean(), level, rtol=0.02, atol=0)
    border = noise.std(0)[0].mean()
    torch.testing.assert_close(border, level, rtol=0.05, atol=0)
    inner = noise[(slice(None), *[slice(4, -4)] * dim)]
    neighbours = (inner[..., 1:] * inner[..., :-1]).mean() / level**2
    # white noise blurred with sigma s has the autocorrelation exp(-d^2 / (4 s^2))
    assert neighbours.item() == pytest.approx(np.exp(-0.25) if correlation else 0.0, abs=0.03)


def test_counterfactuals_of_one_image_have_different_noise_and_channels_too():
    image = make_image(2, channels=2)
    acquired, _ = acquire(only(noise_level=(0.1, 0.1)), image, count=2, scheme="NoNormalization")
    noise = (acquired - image).flatten(2).reshape(4, -1)
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.1


def test_z_scored_counterfactuals_have_the_mean_and_standard_deviation_of_the_original():
    image = make_image(3)
    settings = AcquisitionSettings(probability=1.0, point_spread=(0.0, 0.0), bias_field=(0.0, 0.0))
    acquired, _ = acquire(settings, image, count=12)
    torch.testing.assert_close(acquired.flatten(1).mean(1), torch.zeros(12), atol=0.03, rtol=0)
    torch.testing.assert_close(acquired.flatten(1).std(1), torch.ones(12), atol=0.04, rtol=0)


def test_intensities_of_ct_and_rescaled_images_stay_in_their_bounds():
    image = make_image(2)
    table = intensity_quantiles(image)[0]
    acquired, _ = acquire(AcquisitionSettings(probability=1.0), image, scheme="CTNormalization")
    assert acquired.min() >= image.min() and acquired.max() <= image.max()
    within = (image > table[0]) & (image < table[-1])
    changed = acquired[:, within]
    assert changed.min() >= table[0] and changed.max() <= table[-1]
    share = (image - image.min()) / (image.max() - image.min())
    acquired, _ = acquire(AcquisitionSettings(probability=1.0), share, scheme="RescaleTo01Normalization")
    assert acquired.min() >= 0 and acquired.max() <= 1


def test_half_precision_images_and_autocast_do_not_lose_precision_on_the_way():
    image = make_image(3)
    parameters = draw(AcquisitionSettings(probability=1.0, noise_level=(0.0, 0.0)), image, 1)
    expected = apply_acquisition(image[None], parameters, (1.0, 1.0, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_acquisition(image[None], parameters, (1.0, 1.0, 1.0)), expected)
    half = apply_acquisition(image[None].half(), parameters, (1.0, 1.0, 1.0))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, atol=1e-2, rtol=0)


def test_voxels_outside_of_the_mask_keep_their_intensity():
    image = make_image(2)
    inside = torch.zeros(4, 1, *SHAPES[2], dtype=torch.bool)
    inside[..., 10:] = True
    acquired, _ = acquire(AcquisitionSettings(probability=1.0), image, inside=inside)
    assert torch.equal(acquired[..., :10], image.expand_as(acquired)[..., :10])
    assert not torch.allclose(acquired[..., 10:], image.expand_as(acquired)[..., 10:])


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "CTNormalization", "NoNormalization"])
def test_a_constant_image_stays_finite(scheme):
    acquired, _ = acquire(AcquisitionSettings(probability=1.0), torch.zeros(1, 12, 12), scheme=scheme)
    assert acquired.isfinite().all()


def test_inconsistent_shapes_raise_with_the_expected_shapes():
    image = make_image(2)
    table = intensity_quantiles(image)
    with pytest.raises(ValueError, match="expected target quantiles"):
        draw_acquisition(torch.Generator(), OFF, table, table[None], 2, ("NoNormalization",), 3)
    with pytest.raises(ValueError, match="spacing must have 2 values"):
        acquire(OFF, image, spacing=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("dim", [2, 3])
def test_under_z_scoring_bias_field_and_point_spread_keep_mean_and_standard_deviation(dim):
    image = make_image(dim, channels=2) + torch.tensor([0.0, 1.0]).view(2, *[1] * dim)
    acquired, _ = acquire(only(bias_field=(0.4, 0.4), point_spread=(1.0, 1.0)), image, count=6)
    assert not torch.allclose(acquired[0], image, atol=0.05)
    # the curve is the identity here, but for its continuation beyond the robust range
    expected = image.flatten(1)
    torch.testing.assert_close(acquired.flatten(2).mean(-1), expected.mean(-1).expand(6, 2), atol=0.03, rtol=0)
    torch.testing.assert_close(acquired.flatten(2).std(-1), expected.std(-1).expand(6, 2), atol=0.05, rtol=0)


def test_without_z_scoring_a_point_spread_lowers_the_deviation():
    image = make_image(2)
    acquired, _ = acquire(only(point_spread=(2.0, 2.0)), image, scheme="NoNormalization")
    assert (acquired.flatten(2).std(-1) < 0.9 * image.std()).all()


def test_only_voxels_inside_the_mask_determine_the_moments():
    image = make_image(2)
    inside = torch.zeros(1, 1, *SHAPES[2], dtype=torch.bool)
    inside[..., 5:25, 5:35] = True
    masked = torch.where(inside[0], image, 0)
    acquired, _ = acquire(only(point_spread=(1.0, 1.0)), masked, count=1, inside=inside)
    assert torch.equal(acquired[~inside], masked[None][~inside])
    torch.testing.assert_close(acquired[inside].std(), masked[None][inside].std(), atol=0.05, rtol=0)
