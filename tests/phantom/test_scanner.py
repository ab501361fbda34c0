"""Scanner model: each of its parts alone, and reuse on other volumes."""

from dataclasses import replace

import numpy as np
import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phantom.anatomy import TISSUES
from nnunet_cfcl.phantom.scanner import (
    SCANNER_A,
    SCANNER_B,
    AcquisitionNoise,
    ScannerParameters,
    apply_scanner,
    draw_acquisition_noise,
    log_gain,
    transfer,
)

PLAIN = ScannerParameters("plain", ((0.0, 0.0), (1.0, 1.0)), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def some_noise(shape=(20, 24), seed=0) -> AcquisitionNoise:
    return draw_acquisition_noise(np.random.default_rng(seed), shape)


@pytest.mark.parametrize("shape", [(20, 24), (8, 10, 12)])
def test_a_scanner_without_any_effect_returns_the_scene(shape):
    scene = np.random.default_rng(0).random(shape)
    image = apply_scanner(scene, PLAIN, some_noise(shape))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, scene, atol=1e-6)


@pytest.mark.parametrize("parameters", [SCANNER_A, SCANNER_B])
@pytest.mark.parametrize("shape", [(20, 24), (8, 10, 12)])
def test_images_stay_between_zero_and_one_for_any_scene(parameters, shape):
    scene = np.random.default_rng(1).normal(0.5, 1.0, shape)
    image = apply_scanner(scene, parameters, some_noise(shape))
    assert image.shape == shape and image.min() >= 0.0 and image.max() <= 1.0


def test_the_transfer_curve_passes_through_its_nodes_and_is_monotone_between_them():
    nodes = np.array(SCANNER_B.curve)
    np.testing.assert_allclose(transfer(nodes[:, 0], SCANNER_B), nodes[:, 1])
    for (a, ya), (b, yb) in zip(nodes[:-1], nodes[1:], strict=True):
        steps = np.diff(transfer(np.linspace(a, b, 50), SCANNER_B)) * np.sign(yb - ya)
        assert (steps >= -1e-12).all()


def test_scanner_b_swaps_the_order_of_tissues_that_scanner_a_keeps():
    tissues = np.array([TISSUES[name] for name in ("lung", "muscle", "myocardium", "blood")])
    a, b = transfer(tissues, SCANNER_A), transfer(tissues, SCANNER_B)
    assert a.argsort().tolist() == [0, 1, 2, 3]
    assert b.argsort().tolist() == [1, 0, 3, 2]
    # each boundary stays visible: well above the noise
    assert np.abs(np.diff(b))[[0, 1]].min() > 8 * SCANNER_B.noise_level


def test_the_noise_has_the_stated_level_and_the_same_white_field_behind_it():
    scene, noise = np.full((96, 96), 0.5), some_noise((96, 96))
    white = apply_scanner(scene, replace(PLAIN, noise_level=0.02), noise) - 0.5
    np.testing.assert_allclose(white, 0.02 * noise.white, atol=1e-6)
    coarse = apply_scanner(scene, replace(PLAIN, noise_level=0.02, noise_correlation=1.0), noise) - 0.5
    assert coarse.std() == pytest.approx(0.02, rel=0.15)
    assert np.corrcoef(coarse.ravel(), noise.white.ravel())[0, 1] > 0.4


def test_the_point_spread_is_in_millimetres():
    scene, noise = np.zeros((21, 21)), some_noise((21, 21))
    scene[10, 10] = 1.0
    image = apply_scanner(scene, replace(PLAIN, psf_sigma=1.5), noise, spacing=(1.5, 0.75)).astype(float)
    offset = np.arange(21) - 10
    for axis, pixel in enumerate((1.5, 0.75)):
        variance = (image.sum(1 - axis) * (offset * pixel) ** 2).sum() / image.sum()
        assert np.sqrt(variance) == pytest.approx(1.5, rel=0.03)


def test_shading_brightens_the_front_and_exposure_scales_everything():
    noise = replace(some_noise((16, 16)), exposure=1.0)
    shading = log_gain(replace(PLAIN, shading=0.2), noise)
    np.testing.assert_allclose(shading, -shading[::-1], atol=1e-12)
    assert shading[0, 0] == pytest.approx(0.2 * 15 / 16)
    np.testing.assert_allclose(log_gain(replace(PLAIN, exposure_std=0.03), noise), 0.03)


@pytest.mark.parametrize("curve", [((0.0, 0.0),), ((0.0, 0.0), (0.5, 1.2), (1.0, 1.0)), ((0.1, 0.0), (1.0, 1.0))])
def test_a_transfer_curve_that_does_not_cover_the_unit_interval_is_rejected(curve):
    with pytest.raises(UserError, match="transfer curve of scanner 'plain'"):
        replace(PLAIN, curve=curve)


def test_a_negative_standard_deviation_is_rejected_by_name():
    with pytest.raises(UserError, match="psf_sigma of scanner 'plain' must not be negative, found -1.0"):
        replace(PLAIN, psf_sigma=-1.0)


def test_noise_of_another_shape_is_rejected():
    with pytest.raises(UserError, match="must have the same axes"):
        apply_scanner(np.zeros((20, 20)), PLAIN, some_noise((20, 24)))
