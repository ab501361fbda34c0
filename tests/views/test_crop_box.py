"""Crops: inside the image where it is large enough, padded with known validity where it is not."""

import numpy as np
import pytest
import torch

from nnunet_cfcl.views import CropBox, draw_crop_box, read_crop
from nnunet_cfcl.views.crop_box import crop_around

FITTING = [((30, 20, 25), (10, 12, 9)), ((1, 40, 50), (16, 20)), ((7, 40, 50), (16, 20))]


@pytest.mark.parametrize(("shape", "size"), FITTING)
def test_a_crop_that_fits_lies_inside_the_image(shape, size):
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    for seed in range(50):
        box = draw_crop_box(torch.Generator().manual_seed(seed), shape, size)
        crop = read_crop(box, lambda part: image[(slice(None), *part)])
        assert crop.shape == (2, *size)
        assert box.valid_range == ((0,) * len(size), tuple(size))
        expected = image[(slice(None), *(slice(s, s + n) for s, n in zip(box.start, box.size, strict=True)))]
        np.testing.assert_array_equal(crop.numpy().reshape(expected.shape), expected)


def test_every_position_is_drawn_equally_often():
    starts = [draw_crop_box(torch.Generator().manual_seed(s), (1, 8, 8), (6, 8)).start[1] for s in range(1500)]
    counts = np.bincount(starts, minlength=3)
    assert len(counts) == 3 and counts.min() > 400


def test_a_crop_larger_than_the_image_is_centred_and_padded_with_zeros():
    image = np.ones((1, 5, 6, 20), dtype=np.float32)
    box = draw_crop_box(torch.Generator().manual_seed(0), (5, 6, 20), (9, 9, 8))
    crop = read_crop(box, lambda part: image[(slice(None), *part)])
    low, high = box.valid_range
    assert [b - a for a, b in zip(low, high, strict=True)] == [5, 6, 8]
    assert abs(low[0] - (9 - high[0])) <= 1 and abs(low[1] - (9 - high[1])) <= 1
    assert crop.sum() == 5 * 6 * 8
    assert crop[0, low[0] : high[0], low[1] : high[1], low[2] : high[2]].min() == 1


@pytest.mark.parametrize(("length", "size", "start"), [(5, 15, -5), (6, 15, -5), (1, 20, -10)])
def test_the_padding_of_a_drawn_crop_is_equal_on_both_sides(length, size, start):
    assert draw_crop_box(torch.Generator().manual_seed(0), (1, length, 9), (size, 9)).start == (0, start, 0)


def test_a_slice_of_a_volume_is_the_slice_that_was_drawn():
    volume = np.arange(4, dtype=np.float32)[:, None, None] * np.ones((1, 4, 5, 5), dtype=np.float32)
    box = CropBox((2, 0, 0), (1, 5, 5), (4, 5, 5), 2)
    assert read_crop(box, lambda part: volume[(slice(None), *part)]).unique().tolist() == [2.0]


@pytest.mark.parametrize(("start", "size", "dim"), [
    ((-2, -3, 1), (9, 8, 9), 3), ((4, 5, -6), (3, 9, 7), 3), ((0, 0, 0), (5, 6, 20), 3), ((2, -3, 18), (1, 12, 7), 2)])
def test_an_extended_crop_repeats_the_border_and_a_padded_one_has_the_value(start, size, dim):
    image = np.random.default_rng(0).normal(size=(2, 5, 6, 20)).astype(np.float32)
    box = CropBox(start, size, (5, 6, 20), dim)
    part = image[(slice(None), *box.inside)]
    extended, padded = box.extend(part), box.pad(part, -7)
    assert extended.shape == padded.shape == (2, *size[-dim:]) and extended.dtype == padded.dtype == torch.float32
    for place in np.ndindex(size):
        voxel = [s + n for s, n in zip(start, place, strict=True)]
        nearest = tuple(min(max(v, 0), n - 1) for v, n in zip(voxel, image.shape[1:], strict=True))
        crop = (slice(None), *place[-dim:])
        np.testing.assert_array_equal(extended[crop], image[(slice(None), *nearest)])
        expected = image[(slice(None), *nearest)] if nearest == tuple(voxel) else [-7, -7]
        np.testing.assert_array_equal(padded[crop], expected)


def test_a_crop_around_a_voxel_contains_it_and_stays_inside():
    for voxel in ((0, 0, 0), (4, 9, 19), (2, 5, 3)):
        box = crop_around(voxel, (5, 10, 20), (3, 4, 6))
        assert all(s <= at < s + size and 0 <= s <= n - size
                   for s, at, size, n in zip(box.start, voxel, box.size, box.shape))
    assert crop_around((2, 5, 3), (5, 10, 20), (4, 30)).start == (2, 3, -5)  # its slice; centred where it is larger
