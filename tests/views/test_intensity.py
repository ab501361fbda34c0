"""Intensity effects of views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch.utils.data import default_collate

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.views import IntensityParameters, apply_intensity, draw_intensity
from nnunet_cfcl.views.gaussian_blur import gaussian_blur

SETTINGS = ViewSettings()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def effects(brightness=1.0, contrast=1.0, sigma=0.0, solarise=False, n=1) -> IntensityParameters:
    return IntensityParameters(*(torch.full((n,), value) for value in (brightness, contrast, sigma, solarise)))


def scaled(image: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """v, low, range of one image by a full sort."""
    ordered = image.flatten().sort().values
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.005, 0.995))
    return (image - low) / (high - low), low, high - low


def image_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return 40 * torch.randn(shape, generator=generator(seed), dtype=torch.float64).exp() - 300


@pytest.mark.parametrize("size", [(30, 25), (12, 10, 14)])
def test_brightness_multiplies_the_rescaled_intensities(size):
    image = image_of(1, 1, *size)
    v, low, width = scaled(image)
    got = apply_intensity(image, effects(brightness=1.3), SETTINGS, (1.0,) * len(size))
    torch.testing.assert_close(got, low + width * 1.3 * v, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [(30, 25), (12, 10, 14)])
def test_contrast_blends_with_the_mean_after_brightness(size):
    image = image_of(1, 1, *size)
    v, low, width = scaled(image)
    got = apply_intensity(image, effects(brightness=0.8, contrast=1.4), SETTINGS, (1.0,) * len(size))
    bright = 0.8 * v
    torch.testing.assert_close(got, low + width * (1.4 * bright - 0.4 * bright.mean()), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_solarise_inverts_what_is_above_the_threshold_and_clips_outliers(threshold):
    image = image_of(1, 1, 30, 25)
    v, low, width = scaled(image)
    got = apply_intensity(image, effects(solarise=True), ViewSettings(solarise_threshold=threshold), (1.0, 1.0))
    expected = torch.where(v > threshold, 1 - v.clamp(max=1), v)
    torch.testing.assert_close(got, low + width * expected, rtol=1e-6, atol=1e-4)


def test_all_effects_together_agree_with_the_documented_order():
    image = image_of(1, 1, 20, 16)
    v, low, width = scaled(image)
    got = apply_intensity(image, effects(1.2, 0.7, 1.3, True), SETTINGS, (1.0, 1.0))
    v = 1.2 * v
    v = 0.7 * v + 0.3 * v.mean()
    v = gaussian_blur(v, torch.full((1, 2), 1.3, dtype=torch.float64))
    v = torch.where(v > 0.5, 1 - v.clamp(max=1), v)
    torch.testing.assert_close(got, low + width * v, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("spacing, sigmas", [
    ((1.0, 1.0), (1.7, 1.7)), ((2.0, 1.0), (0.85, 1.7)), ((3.0, 0.5, 1.0), (1.7 / 6, 1.7, 0.85)),
])
def test_blur_agrees_with_scipy_and_is_isotropic_in_millimetres(spacing, sigmas):
    size = (18, 15, 12)[:len(spacing)]
    image = torch.randn(size, generator=generator(), dtype=torch.float64)
    got = apply_intensity(image[None, None], effects(sigma=1.7), SETTINGS, spacing)[0, 0]

    def blurred(x):
        return ndimage.gaussian_filter(x, sigmas, mode="constant", truncate=12)

    expected = blurred(image.numpy()) / blurred(np.ones(size))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_only_images_with_a_sigma_are_blurred_and_each_with_its_own():
    images = image_of(3, 2, 14, 11)
    parameters = effects(n=3)._replace(blur_sigma=torch.tensor([0.0, 0.6, 2.0]))
    got = apply_intensity(images, parameters, SETTINGS, (1.0, 1.0))
    torch.testing.assert_close(got[0], images[0], rtol=1e-12, atol=1e-9)
    for i, sigma in ((1, 0.6), (2, 2.0)):
        one = gaussian_blur(images[i:i + 1], torch.full((1, 2), sigma, dtype=torch.float64))
        torch.testing.assert_close(got[i:i + 1], one, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, -3.5, 1000.0])
def test_a_constant_image_stays_as_it_is(value):
    image = torch.full((1, 1, 12, 10, 8), value)
    got = apply_intensity(image, effects(1.4, 0.6, 1.5, True), SETTINGS, (1.0, 1.0, 1.0))
    torch.testing.assert_close(got, image, rtol=1e-5, atol=1e-6)


def test_an_image_with_a_few_bright_voxels_only_stays_finite_and_keeps_them():
    image = torch.zeros(1, 1, 40, 40)
    image[0, 0, 3, 4] = 5.0
    got = apply_intensity(image, effects(1.2, 1.0, 0.0, True), SETTINGS, (1.0, 1.0))
    torch.testing.assert_close(got, 1.2 * image)


def test_no_effect_leaves_the_image_and_never_writes_into_it():
    images = image_of(2, 1, 12, 10).float()
    before = images.clone()
    torch.testing.assert_close(apply_intensity(images, effects(n=2), SETTINGS, (1.0, 1.0)), images)
    apply_intensity(images, effects(1.3, 0.7, 1.0, True, n=2), SETTINGS, (1.0, 1.0))
    assert torch.equal(images, before)


@pytest.mark.parametrize("size, spacing", [((40, 30), (1.0, 2.0)), ((10, 20, 16), (4.0, 1.0, 1.0))])
def test_a_batch_equals_images_one_by_one(size, spacing):
    images = image_of(6, 2, *size).float()
    parameters = draw_intensity(generator(2), SETTINGS, 6, [True] * 6)
    batch = apply_intensity(images, parameters, SETTINGS, spacing)
    singles = [
        apply_intensity(images[i:i + 1], IntensityParameters(*(p[i:i + 1] for p in parameters)), SETTINGS, spacing)
        for i in range(6)]
    torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-5, atol=1e-3)


def test_channels_are_rescaled_independently():
    one, two = image_of(1, 1, 20, 20), 1000 * image_of(1, 1, 20, 20, seed=1)
    both = apply_intensity(torch.cat([one, two], 1), effects(1.3, 0.8, 1.0, True), SETTINGS, (1.0, 1.0))
    for channel, image in enumerate((one, two)):
        alone = apply_intensity(image, effects(1.3, 0.8, 1.0, True), SETTINGS, (1.0, 1.0))
        torch.testing.assert_close(both[:, channel:channel + 1], alone)


def test_effects_follow_the_intensity_scale():
    image, parameters = image_of(1, 1, 20, 20), effects(1.3, 0.8, 1.0, True)
    plain = apply_intensity(image, parameters, SETTINGS, (1.0, 1.0))
    moved = apply_intensity(3 * image + 50, parameters, SETTINGS, (1.0, 1.0))
    torch.testing.assert_close(moved, 3 * plain + 50)


@pytest.mark.parametrize("size", [(512, 384), (64, 80, 48)])
def test_percentiles_of_large_images_are_found_from_a_subsample_of_all_columns(size):
    # intensity depends on the column alone: a stride in step with the columns would see a few only
    image = torch.linspace(0, 1, size[-1], dtype=torch.float64).expand(1, 1, *size)
    got = apply_intensity(image, effects(brightness=1.5), SETTINGS, (1.0,) * len(size))
    low = 0.005
    assert float((got - (low + 1.5 * (image - low))).abs().max()) < 0.01


def test_effects_are_computed_in_float32_under_autocast_and_for_half_images():
    images = torch.randn(2, 1, 16, 16, generator=generator())
    parameters = effects(1.2, 0.8, 1.0, True, n=2)
    plain = apply_intensity(images, parameters, SETTINGS, (1.0, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_intensity(images, parameters, SETTINGS, (1.0, 1.0)), plain)
    assert apply_intensity(images.half(), parameters, SETTINGS, (1.0, 1.0)).dtype == torch.float16


def test_drawn_effects_have_the_configured_distributions():
    n = 4000
    drawn = draw_intensity(generator(), SETTINGS, n, torch.arange(n) % 2 == 0)
    jittered = drawn.brightness != 1
    assert torch.equal(jittered, drawn.contrast != 1)
    assert float(jittered.float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((drawn.blur_sigma > 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(drawn.solarise[::2].float().mean()) == pytest.approx(0.2, abs=0.03)
    assert not bool(drawn.solarise[1::2].any())
    for values, low, width in (
        (drawn.brightness[jittered], 0.6, 0.8), (drawn.contrast[jittered], 0.6, 0.8),
        (drawn.blur_sigma[drawn.blur_sigma > 0], 0.1, 1.9),
    ):
        assert stats.kstest(values.double().numpy(), stats.uniform(low, width).cdf).pvalue > 0.01
    pair = torch.stack([drawn.brightness[jittered], drawn.contrast[jittered]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.05


def test_effects_can_be_switched_off():
    off = ViewSettings(jitter_probability=0, blur_probability=0, solarise_probability=0)
    drawn = draw_intensity(generator(), off, 50, [True] * 50)
    assert bool((drawn.brightness == 1).all() and (drawn.contrast == 1).all() and (drawn.blur_sigma == 0).all())
    assert not bool(drawn.solarise.any())


def test_draws_repeat_with_the_seed_and_consume_equal_numbers_for_any_settings():
    one, two = generator(1), generator(1)
    a = draw_intensity(one, SETTINGS, 5, [True] * 5)
    draw_intensity(two, ViewSettings(jitter_probability=0), 5, [False] * 5)
    assert all(map(torch.equal, a, draw_intensity(generator(1), SETTINGS, 5, [True] * 5)))
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))


def test_parameters_of_samples_stack_in_a_data_loader():
    samples = [draw_intensity(generator(i), SETTINGS, 4, [False, True, True, True]) for i in range(3)]
    batch = default_collate(samples)
    assert isinstance(batch, IntensityParameters) and batch.brightness.shape == (3, 4)
    assert batch.solarise.dtype == torch.bool


def test_wrong_numbers_of_flags_or_parameters_are_errors():
    with pytest.raises(ValueError, match="3 solarise flags"):
        draw_intensity(generator(), SETTINGS, 3, [True])
    with pytest.raises(ValueError, match="parameters of 2 images, found 1"):
        apply_intensity(torch.zeros(2, 1, 4, 4), effects(), SETTINGS, (1.0, 1.0))
