"""Sliding windows have nnU-Net's own positions and weights, on images of any size."""

import pickle
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows


def nnunets_windows(patch_size, shape) -> list[tuple[slice, ...]]:
    """Positions of the patch in nnU-Net's prediction."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.configuration_manager = SimpleNamespace(patch_size=patch_size)
    predictor.label_manager = None
    return [tuple(part if isinstance(part, slice) else slice(part, part + 1) for part in slicer[1:])
            for slicer in predictor._internal_get_sliding_window_slicers(shape)]


def found_windows(windows, shape) -> list[tuple[slice, ...]]:
    axes = windows(shape)
    return [tuple(slice(start, start + axis.shares.shape[1]) for start, axis in zip(starts, axes))
            for starts in product(*(axis.starts for axis in axes))]


SIZES = pytest.mark.parametrize(
    ("patch_size", "shape"),
    [((8, 16, 12), (21, 40, 12)), ((7, 9, 11), (7, 10, 33)), ((16, 12), (5, 41, 30)), ((16, 12), (1, 16, 13))],
    ids=["3d", "3d, odd sizes", "2d, slice by slice", "2d, one slice"])


@SIZES
def test_windows_are_where_nnunets_prediction_puts_them(patch_size, shape):
    assert found_windows(SlidingWindows(patch_size), shape) == nnunets_windows(patch_size, shape)


@SIZES
def test_shares_are_nnunets_gaussian_in_the_sum_over_all_windows(patch_size, shape):
    """The product of the shares along the axes equals nnU-Net's weight map of the whole volume."""
    windows = SlidingWindows(patch_size)
    gaussian = compute_gaussian(patch_size, dtype=torch.float64, device=torch.device("cpu"))
    total = torch.zeros(shape, dtype=torch.float64)
    for place in found_windows(windows, shape):
        total[place] += gaussian.view(total[place].shape)
    axes = windows(shape)
    for place, index in zip(found_windows(windows, shape), product(*(range(len(axis.starts)) for axis in axes))):
        share = torch.ones(())
        for axis, number in zip(axes, index):
            share = share[..., None] * axis.shares[number]
        expected = gaussian.view(total[place].shape) / total[place]
        torch.testing.assert_close(share.double(), expected, rtol=1e-5, atol=1e-9)


@SIZES
def test_shares_of_all_windows_sum_to_one_in_every_voxel(patch_size, shape):
    for axis, size in zip(SlidingWindows(patch_size)(shape), shape):
        total = torch.zeros(size)
        for start, share in zip(axis.starts, axis.shares):
            total[start : start + len(share)] += share
        torch.testing.assert_close(total, torch.ones(size), rtol=0, atol=1e-6)


def test_along_an_axis_shorter_than_the_patch_one_window_extends_beyond_both_sides():
    z, y, x = SlidingWindows((8, 16, 12))((3, 16, 30))
    assert z.starts == (-3,) and y.starts == (0,) and x.starts == (0, 6, 12, 18)
    torch.testing.assert_close(z.shares, torch.ones(1, 8))


def test_more_overlap_gives_more_windows(patch_size=(8, 8)):
    assert len(SlidingWindows(patch_size, 0.25)((32, 32))[0].starts) == 13
    assert len(SlidingWindows(patch_size, 1.0)((32, 32))[0].starts) == 4


def test_windows_can_be_pickled_into_workers():
    windows = SlidingWindows((8, 8))
    assert pickle.loads(pickle.dumps(windows)) == windows
