"""Which slices are chosen."""

import numpy as np
import pytest

from nnunet_cfcl.chromap.slices import informative_slices, labels_of

GREY = np.full((20, 21, 22, 3), 128, np.uint8)


def some_colors(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_the_largest_slice_of_the_mask_is_chosen_and_others_that_have_some_of_it_apart_from_it():
    z, y, x = np.indices((20, 21, 22))
    mask = ((z - 6) ** 2 + (y - 12) ** 2 + (x - 9) ** 2 < 30).astype(np.int8)
    for axis, centre in enumerate((6, 12, 9)):
        chosen = informative_slices(GREY, None, mask, axis)
        assert len(chosen) == 3 and centre in chosen and list(chosen) == sorted(chosen)
        assert all(np.take(mask, place, axis).any() for place in chosen)
        extent = np.ptp(np.nonzero(mask)[axis]) + 1
        assert min(np.diff(chosen)) >= extent // 4


def test_a_small_label_counts_as_much_as_a_large_one():
    mask = np.zeros((20, 21, 22), np.uint8)
    mask[2:12, 3:18, 3:18] = 1
    mask[9, 4, 4] = 2
    assert 9 in informative_slices(GREY, None, mask, 0, 1)


def test_a_mask_in_one_slice_is_shown_and_others_are_chosen_by_their_colours():
    mask, colors = np.zeros((20, 21, 22), int), GREY.copy()
    mask[17, 3, 3] = 1
    colors[4, :10], colors[11, :5] = 0, 0
    assert informative_slices(colors, None, mask, 0) == (4, 11, 17)


@pytest.mark.parametrize("mask", [None, np.zeros((20, 21, 22), int), np.full((20, 21, 22), -1)])
def test_without_foreground_slices_are_those_whose_colours_vary_most(mask):
    colors = GREY.copy()
    colors[:, 5, :8], colors[:, 15, :11] = 0, 0
    assert informative_slices(colors, None, mask, 1, 2) == (5, 15)


def test_colours_outside_do_not_count():
    colors, inside = some_colors((20, 21, 22)), np.zeros((20, 21, 22), bool)
    inside[3:5], inside[14:16] = True, True
    assert set(informative_slices(colors, inside, None, 0, 2)) <= {3, 4, 14, 15}


def test_slices_that_are_all_alike_are_spread_around_the_middle():
    assert informative_slices(GREY, None, None, 0) in ((4, 9, 14), (5, 10, 15))


def test_slices_without_a_voxel_inside_are_left_out_as_long_as_there_are_others():
    inside = np.zeros((20, 21, 22), bool)
    assert informative_slices(GREY, inside, None, 0) == (10,)
    inside[4, 2:4, 3], inside[5, 2, 3] = True, True
    assert informative_slices(GREY, inside, None, 0) == (4, 5)
    assert informative_slices(some_colors((20, 21, 22)), inside, None, 0) == (4, 5)
    large = np.zeros((20, 300, 300), bool)
    large[7, 101, 201] = True
    assert informative_slices(np.zeros((20, 300, 300, 3), np.uint8), large, None, 0) == (7,)


def test_as_many_slices_as_are_wanted_or_there_are_come_back():
    for length in (1, 2, 3, 5, 8):
        colors = some_colors((length, 4, 5))
        for count in (1, 3, 7):
            for mask in (None, np.eye(4, 5, dtype=int)[None].repeat(length, 0)):
                chosen = informative_slices(colors, None, mask, 0, count)
                assert len(set(chosen)) == len(chosen) == min(count, length)
                assert all(0 <= place < length for place in chosen)


def test_foreground_labels_are_those_above_zero():
    mask = np.zeros((3, 4, 5), np.int16)
    mask[0, 0, 0], mask[2, 3, 4], mask[1, 1, 1] = 7, 2, -1
    assert labels_of(mask) == [2, 7] and labels_of(mask == 7) == [1] and labels_of(np.zeros((1, 2, 3), np.uint16)) == []
