"""Metrics of a case against independent computations: distance transforms, and all pairs of surface points."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import distance_transform_edt, shift
from scipy.spatial.distance import cdist

from nnunet_cfcl.evaluation.masks.metrics import case_metrics, diagonal
from nnunet_cfcl.nnunet.label_files import read_label_file

TOLERANCE = 2.0


def surface(mask):
    """Voxels of the mask with a neighbour along an axis outside of the mask or the image."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(mask.ndim):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return (padded & ~inner)[(slice(1, -1),) * mask.ndim]


def by_transforms(truth, prediction, spacing):
    """Compute HD95, ASSD and NSD by distance transforms of the whole image."""
    surfaces = surface(truth), surface(prediction)
    there = [distance_transform_edt(~other, sampling=spacing)[one] for one, other in (surfaces, surfaces[::-1])]
    both = np.concatenate(there)
    return max(np.percentile(one, 95) for one in there), both.mean(), np.mean(both <= TOLERANCE)


def by_pairs(truth, prediction, spacing):
    """Compute HD95, ASSD and NSD from all pairs of surface points."""
    points = [np.argwhere(surface(mask)) * np.asarray(spacing) for mask in (truth, prediction)]
    pairs = cdist(*points)
    there = [pairs.min(1), pairs.min(0)]
    both = np.concatenate(there)
    return max(np.percentile(one, 95) for one in there), both.mean(), np.mean(both <= TOLERANCE)


def blobs(seed, shape=(14, 20, 18)):
    """Draw two random overlapping shapes, some of which touch the border of the image."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    masks = []
    for _ in range(2):
        center, radii = np.array(shape) / 2 + random.normal(0, 2, len(shape)), random.uniform(3, 9, len(shape))
        masks.append((((grid - center) / radii) ** 2).sum(-1) < 1)
    return masks


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)])
def test_anisotropic_shapes_agree_with_distance_transforms_and_all_pairs_of_points(seed, spacing):
    truth, prediction = blobs(seed)
    found = case_metrics(truth.astype(np.int32), prediction.astype(np.int32), spacing, TOLERANCE)[1]
    for expected in (by_transforms(truth, prediction, spacing), by_pairs(truth, prediction, spacing)):
        assert (found.hd95_mm, found.assd_mm, found.nsd) == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils:FutureWarning")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)])
def test_the_metrics_equal_those_of_monai(spacing):
    truth, prediction = blobs(3)
    found = case_metrics(truth.astype(np.int32), prediction.astype(np.int32), spacing, TOLERANCE)[1]
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    common = {"include_background": True, "spacing": list(spacing)}
    assert found.hd95_mm == pytest.approx(compute_hausdorff_distance(*pair, percentile=95, **common).item(), abs=1e-5)
    assert found.assd_mm == pytest.approx(
        compute_average_surface_distance(*pair, symmetric=True, **common).item(), abs=1e-5)
    assert found.nsd == pytest.approx(compute_surface_dice(*pair, [TOLERANCE], **common).item(), abs=1e-6)


def test_a_cube_shifted_by_one_slice_has_the_metrics_computed_by_hand(box):
    truth, prediction = box((1, 2, 2)), box((2, 2, 2))
    found = case_metrics(truth, prediction, (3.0, 1.0, 1.0), TOLERANCE)[1]
    # 56 of a cube's 64 voxels are on its surface: the face outside the other cube (16) is one slice, 3 mm, away; the
    # center of the face inside it (4) is 1 mm from its sides; all others (36) lie on its surface
    assert found.dice == 2 * 48 / 128
    assert found.hd95_mm == 3.0
    assert found.assd_mm == pytest.approx((16 * 3 + 4 * 1) / 56)
    assert found.nsd == pytest.approx(40 / 56)


def test_a_2d_image_has_the_same_metrics_as_a_single_slice_along_any_axis():
    truth, prediction = (mask[7].astype(np.int32) for mask in blobs(1))
    flat = case_metrics(truth, prediction, (0.7, 1.3), TOLERANCE)
    assert case_metrics(truth[None], prediction[None], (999.0, 0.7, 1.3), TOLERANCE) == flat
    assert case_metrics(truth[..., None], prediction[..., None], (0.7, 1.3, 4.0), TOLERANCE) == flat
    expected = by_pairs(truth > 0, prediction > 0, (0.7, 1.3))
    assert (flat[1].hd95_mm, flat[1].assd_mm, flat[1].nsd) == pytest.approx(expected, abs=1e-5)


def test_identical_masks_are_perfect(box):
    found = case_metrics(box((0, 0, 0)), box((0, 0, 0)), (2.0, 1.0, 1.0), TOLERANCE)[1]
    assert found.values == (1.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_label_in_exactly_one_mask_has_dice_0_and_no_distance(box, swapped):
    masks = [box((1, 2, 2)), np.zeros((8, 12, 12), np.uint8)][:: -1 if swapped else 1]
    found = case_metrics(*masks, (1.0, 1.0, 1.0), TOLERANCE)[1]
    assert (found.dice, found.nsd, found.missed) == (0.0, 0.0, True)
    assert math.isnan(found.hd95_mm) and math.isnan(found.assd_mm)


def test_metrics_of_a_label_in_neither_mask_are_nan(box):
    found = case_metrics(box((1, 2, 2)), box((1, 2, 2)), (1.0, 1.0, 1.0), TOLERANCE, labels=(1, 7))
    assert all(math.isnan(value) for value in found[7].values)
    assert not found[7].missed
    assert list(found) == [1, 7]


def test_ignored_voxels_count_as_background_in_both_masks(box):
    truth, prediction = box((1, 2, 2)), box((1, 2, 2))
    truth[:, 8:] = 3
    prediction[:, 9:] = 1
    found = case_metrics(truth, prediction, (1.0, 1.0, 1.0), TOLERANCE, ignore=3)
    assert {label: one.values for label, one in found.items()} == {1: (1.0, 0.0, 0.0, 1.0)}


def test_different_shapes_are_an_error(box):
    with pytest.raises(ValueError, match="must match"):
        case_metrics(box((1, 2, 2)), box((1, 2, 2))[1:], (1.0, 1.0, 1.0), TOLERANCE)


def test_the_diagonal_leaves_out_axes_of_one_voxel():
    assert diagonal((1, 3, 4), (999.0, 1.0, 1.0)) == 5
    assert diagonal((2, 3, 6), (1.0, 1.0, 1.0)) == 7


def test_ten_real_cases_agree_with_distance_transforms_and_with_the_dice_of_nnunet(real_images, write_mask, tmp_path):
    random = np.random.default_rng(0)
    files = sorted((real_images / "Dataset004_Hippocampus" / "labelsTr").glob("*.nii.gz"))[:10]
    assert len(files) == 10
    for file in files:
        plain = read_label_file(file)
        spacing = (1.5, *plain.spacing[1:])
        moved = shift(plain.labels, random.normal(0, 1.2, 3), order=0).astype(np.uint8)
        pair = [write_mask(tmp_path / folder / file.name, labels, spacing)
                for folder, labels in (("truth", plain.labels.astype(np.uint8)), ("prediction", moved))]
        truth, prediction = map(read_label_file, pair)
        assert truth.spacing == pytest.approx(spacing)
        found = case_metrics(truth.labels, prediction.labels, truth.spacing, TOLERANCE, (1, 2))
        stock = compute_metrics(*map(str, pair), SimpleITKIO(), [1, 2])["metrics"]
        for label, one in found.items():
            assert one.dice == pytest.approx(stock[label]["Dice"], abs=1e-6)
            expected = by_transforms(truth.labels == label, prediction.labels == label, truth.spacing)
            assert (one.hd95_mm, one.assd_mm, one.nsd) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ignore", [None, 3])
def test_dice_of_random_labels_equals_that_of_nnunet_with_and_without_an_ignore_label(write_mask, tmp_path, ignore):
    random = np.random.default_rng(1)
    pair = [write_mask(tmp_path / name, random.integers(0, count, (5, 9, 11)).astype(np.uint8))
            for name, count in (("truth.nii.gz", 4), ("prediction.nii.gz", 3))]
    labels = [1, 2, 5]
    stock = compute_metrics(*map(str, pair), SimpleITKIO(), labels, ignore)["metrics"]
    truth, prediction = (read_label_file(file).labels for file in pair)
    found = case_metrics(truth, prediction, (1.0, 1.0, 1.0), TOLERANCE, labels, ignore)
    assert [found[label].dice for label in labels] == pytest.approx(
        [stock[label]["Dice"] for label in labels], abs=1e-6, nan_ok=True)
