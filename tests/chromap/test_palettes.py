"""Colours against Python's own HSV and an independent way back to OKLCh."""

import colorsys
import math

import numpy as np
import pytest
import torch

from nnunet_cfcl.chromap import palettes
from nnunet_cfcl.chromap.palettes import CHROMA, LIGHTNESS, color_wheel, colors

PALETTES = ("hsv", "oklch")


def polar(degrees, radius):
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], -1) * radius


def random_disc(count, seed=0):
    drawn = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return polar(360 * drawn[:, 0], drawn[:, 1:].sqrt())


def oklab(rgb):
    """OKLab of sRGB bytes by the matrices of CSS Color 4, which come from the standard's primaries; float64."""
    encoded = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[506752 / 1228815, 87881 / 245763, 12673 / 70218],
                       [87098 / 409605, 175762 / 245763, 12673 / 175545],
                       [7918 / 409605, 87881 / 737289, 1001167 / 1053270]])
    to_cones = np.array([[0.8190224379967030, 0.3619062600528904, -0.1288737815209879],
                         [0.0329836539323885, 0.9292868615863434, 0.0361446663506424],
                         [0.0481771893596242, 0.2642395317527308, 0.6335478284694309]])
    to_lab = np.array([[0.2104542683093140, 0.7936177747023054, -0.0040720430116193],
                       [1.9779985324311684, -2.4285922420485799, 0.4505937096174110],
                       [0.0259040424655478, 0.7827717124575296, -0.8086757549230774]])
    return np.cbrt(linear @ to_xyz.T @ to_cones.T) @ to_lab.T


@pytest.mark.parametrize(("degrees", "expected"), [
    (0, (255, 0, 0)), (60, (255, 255, 0)), (120, (0, 255, 0)), (180, (0, 255, 255)), (-120, (0, 0, 255)),
    (300, (255, 0, 255))])
def test_the_rim_of_hsv_has_the_pure_colours_at_their_angles(degrees, expected):
    assert colors(polar(degrees, 1.0), "hsv").tolist() == list(expected)


def test_hsv_is_that_of_the_standard_library_within_a_rounding_step():
    disc = random_disc(3000)
    expected = [colorsys.hsv_to_rgb(math.atan2(y, x) / (2 * math.pi) % 1, math.hypot(x, y), 1)
                for x, y in disc.tolist()]
    assert np.abs(colors(disc, "hsv").numpy() - 255 * np.array(expected)).max() <= 0.501


def test_oklch_has_one_lightness_and_the_chroma_and_hue_of_the_place():
    disc = random_disc(3000)
    found = oklab(colors(disc, "oklch"))
    # a step of one channel of 255 changes lightness by 0.004 at most, and a and b by 0.007
    assert np.abs(found[:, 0] - LIGHTNESS).max() < 0.003
    assert np.abs(found[:, 1:] - CHROMA * disc.numpy()).max() < 0.006


def test_the_lightness_and_chroma_of_oklch_are_the_largest_that_all_hues_have_within_srgb():
    circle = polar(torch.arange(0, 360, 0.1), 1.0)

    def overflow(lightness, chroma):
        a, b = (circle * chroma).unbind(1)
        cones = torch.stack([(lightness + p * a + q * b) ** 3 for p, q in palettes._TO_CONES])
        linear = torch.tensor(palettes._TO_LINEAR, dtype=torch.float64) @ cones
        return float(torch.maximum(-linear, linear - 1).max())

    assert overflow(LIGHTNESS, CHROMA) < 1e-6
    assert min(overflow(lightness, CHROMA * 1.002) for lightness in np.arange(0.6, 0.9, 0.001)) > 1e-5


@pytest.mark.parametrize("palette", PALETTES)
def test_the_centre_has_no_hue_and_a_radius_beyond_one_is_the_rim(palette):
    centre = colors(torch.zeros(2), palette)
    assert int(centre.max()) - int(centre.min()) <= 1 and (palette == "oklch" or centre.tolist() == [255] * 3)
    outer, rim = colors(polar(torch.arange(360), 7.0), palette), colors(polar(torch.arange(360), 1.0), palette)
    assert (outer.int() - rim.int()).abs().max() <= 1


@pytest.mark.parametrize("palette", PALETTES)
def test_colours_change_steadily_also_across_the_cut_of_the_angle(palette):
    near = colors(torch.tensor([[-0.8, 1e-7], [-0.8, -1e-7], [-0.8, -0.0]]), palette).int()
    assert (near - near[0]).abs().max() == 0
    around = colors(polar(torch.arange(0, 361, 0.25), 0.9), palette).int()
    assert (around[1:] - around[:-1]).abs().max() <= 2


def test_a_turn_by_a_third_permutes_the_channels_of_hsv():
    disc = random_disc(2000)
    angle = 2 * math.pi / 3
    turned = disc @ torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double()
    assert (colors(turned, "hsv").int() - colors(disc, "hsv").int().roll(1, -1)).abs().max() <= 1


@pytest.mark.parametrize("palette", PALETTES)
def test_neither_blocks_nor_shapes_nor_types_change_colours(palette, monkeypatch):
    disc = random_disc(60).float()
    expected = colors(disc, palette)
    monkeypatch.setattr(palettes, "BLOCK", 7)
    assert torch.equal(colors(disc.view(3, 4, 5, 2), palette), expected.view(3, 4, 5, 3))
    assert torch.equal(colors(disc.T.contiguous().movedim(0, -1), palette), expected)
    half = disc.half()
    assert torch.equal(colors(half, palette), colors(half.float(), palette))
    assert colors(torch.empty(0, 4, 2), palette).shape == (0, 4, 3)


@pytest.mark.parametrize("palette", PALETTES)
def test_no_coordinates_are_black(palette):
    assert colors(torch.tensor([[math.nan, 0.0], [0.0, math.nan]]), palette).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("palette", PALETTES)
def test_the_wheel_is_a_disc_with_y_up(palette):
    wheel = color_wheel(101, palette)
    assert wheel.shape == (101, 101, 4) and wheel.dtype == torch.uint8
    assert (wheel[50, 50, 3], wheel[0, 0, 3], wheel[100, 100, 3]) == (255, 0, 0)
    assert float((wheel[..., 3] / 255.0).sum()) == pytest.approx(math.pi * 50.5**2, rel=2e-3)
    x, y = (30 - 50) / 50.5, (50 - 10) / 50.5
    assert torch.equal(wheel[10, 30, :3], colors(torch.tensor([x, y]), palette))


def test_wrong_shapes_and_palettes_are_told():
    with pytest.raises(ValueError, match="expected coordinates"):
        colors(torch.zeros(3, 4), "hsv")
    with pytest.raises(ValueError, match="unknown palette 'jet'"):
        colors(torch.zeros(2), "jet")
