"""Grey images, colours over them, and PNG files that hold just those pixels."""

import numpy as np
import pytest
from PIL import Image

from nnunet_cfcl.chromap.picture import grey, grey_background, grey_window, overlay, write_png


def test_the_outermost_half_percents_are_black_and_white():
    image = np.arange(1001.0).reshape(7, 11, 13)
    assert grey_window(image) == (5, 995)
    shown = grey(image)
    assert shown.dtype == np.uint8 and shown.shape == image.shape
    flat = shown.ravel()
    assert flat[5] == 0 and flat[995] == 255 and flat[500] in (127, 128) and (np.diff(flat.astype(int)) >= 0).all()
    assert (flat[:5] == 0).all() and (flat[996:] == 255).all()


@pytest.mark.parametrize("kind", ["uint8", "int16", "float16", "float64"])
def test_images_of_any_kind_of_number_are_shown_alike(kind):
    image = np.arange(200).reshape(1, 10, 20)
    np.testing.assert_array_equal(grey(image.astype(kind)), grey(image.astype(np.float32)))


def test_constant_empty_and_broken_images_have_shades_too():
    assert (grey(np.full((2, 3), 7)) == 0).all()
    assert grey(np.zeros((0, 3))).shape == (0, 3)
    assert (grey(np.full((2, 3), np.nan)) == 0).all()
    broken = np.arange(1000.0)
    broken[[3, 4, 5]] = np.nan, np.inf, -np.inf
    assert grey(broken)[3:6].tolist() == [0, 255, 0] and grey(broken)[-1] == 255


def test_a_few_bright_voxels_on_a_constant_background_are_seen():
    image = np.zeros((100, 100))
    image[50, 50] = 9
    assert grey_window(image) == (0, 9) and grey(image)[50, 50] == 255


def test_a_large_image_has_the_window_of_its_sample():
    image = np.random.default_rng(0).normal(size=(200, 200, 200)).astype(np.float32)
    np.testing.assert_allclose(grey_window(image), (-2.576, 2.576), atol=0.03)


def test_colours_are_mixed_with_grey_inside_and_grey_is_left_alone_outside():
    background = np.array([[0, 100, 255]], np.uint8)
    colors = np.array([[[255, 0, 100]] * 3], np.uint8)
    inside = np.array([[True, True, False]])
    mixed = overlay(background, colors, 0.5, inside)
    assert mixed.dtype == np.uint8
    np.testing.assert_array_equal(mixed, [[[128, 0, 50], [178, 50, 100], [255, 255, 255]]])
    np.testing.assert_array_equal(overlay(background, colors, 1.0), colors)
    np.testing.assert_array_equal(overlay(background, colors, 0.0), np.repeat(background[..., None], 3, -1))


def test_overlays_are_within_one_step_of_the_exact_mixture():
    random = np.random.default_rng(0)
    background, colors = random.integers(0, 256, (9, 8, 7), np.uint8), random.integers(0, 256, (9, 8, 7, 3), np.uint8)
    for alpha in (0.1, 0.37, 0.5, 0.9):
        exact = alpha * colors.astype(float) + (1 - alpha) * background[..., None].astype(float)
        assert np.abs(overlay(background, colors, alpha) - exact).max() <= 1.05


def test_colours_on_black_are_dimmed_by_the_documented_step():
    image = np.linspace(0, 1, 6)
    colors = np.full((6, 3), 200, np.uint8)
    t = np.clip(image / 0.5, 0, 1)
    for floor in (0.0, 0.25):
        expected = 200 * (floor + (1 - floor) * (3 * t**2 - 2 * t**3))
        dimmed = grey_background(colors, image, window=(0, 1), full=0.5, floor=floor)
        np.testing.assert_allclose(dimmed, np.repeat(expected[:, None], 3, 1), atol=1)
    hued = grey_background(np.array([[200, 100, 0]], np.uint8), np.array([0.1]), window=(0, 1))
    assert hued[0, 0] / 2 == pytest.approx(hued[0, 1], abs=1) and hued[0, 2] == 0


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_a_png_has_the_pixels_of_the_array_and_nothing_else(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_png(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_failure_while_writing_leaves_the_old_picture(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_text("old")

    def fail(self, temporary, **_):
        temporary.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_png(file, np.zeros((2, 2), np.uint8))
    assert file.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["a.png"]


def test_arrays_and_numbers_that_do_not_fit_are_refused(tmp_path):
    background, colors = np.zeros((2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(ValueError, match=r"colours \(\*S, 3\)"):
        overlay(background, colors[:1])
    with pytest.raises(ValueError, match="inside"):
        overlay(background, colors, inside=np.zeros((3, 2), bool))
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, found 1.5"):
        overlay(background, colors, 1.5)
    with pytest.raises(ValueError, match="an image"):
        grey_background(colors, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="0 < full"):
        grey_background(colors, background, full=0)
    with pytest.raises(ValueError, match="uint8, found"):
        write_png(tmp_path / "a.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="uint8, found"):
        write_png(tmp_path / "a.png", np.zeros((2, 2, 2), np.uint8))
