"""Acquisition groups: closed forms of the statistics, then real images with known scanners."""

import csv

import nibabel
import numpy as np
import pytest
from skimage import io
from sklearn.metrics import adjusted_rand_score

from nnunet_cfcl.counterfactual.acquisition.groups import FEATURES, describe_acquisition, find_acquisition_groups


def described(image):
    return dict(zip(FEATURES, describe_acquisition(image)))


def blob(shape=(1, 1, 80, 90)):
    y, x = np.indices(shape[-2:]) / 40 - 1
    return np.broadcast_to(np.exp(-(y**2 + x**2)), shape)


@pytest.mark.parametrize("sd", [0.02, 0.1])
def test_the_level_and_correlation_of_white_noise_match_the_filter(sd):
    image = blob((1, 1, 300, 300)) + np.random.default_rng(0).normal(0, sd, (1, 1, 300, 300))
    found = described(image)
    span = np.ptp(np.quantile(image, (0.01, 0.99)))
    assert np.exp(found["noise level"]) == pytest.approx(sd / span, rel=0.05)
    assert found["noise correlation"] == pytest.approx(-2 / 3, abs=0.03)  # of (1, -2, 1): (-2 - 2) / (1 + 4 + 1)


def test_a_smooth_image_has_almost_no_noise_and_correlated_noise_differs_from_white():
    assert described(blob())["noise level"] < np.log(2e-3)
    white = np.random.default_rng(1).normal(0, 0.1, (1, 1, 80, 91))
    coarse = (white[..., :-1] + white[..., 1:]) / np.sqrt(2)
    apart = described(blob() + coarse)["noise correlation"] - described(blob() + white[..., 1:])["noise correlation"]
    assert apart > 0.2


def test_gain_and_offset_move_the_quantiles_alone():
    image = blob() + np.random.default_rng(2).normal(0, 0.05, (1, 1, 80, 90))
    one, other = describe_acquisition(image), describe_acquisition(3 * image - 7)
    np.testing.assert_allclose(other[:5], 3 * one[:5] - 7)
    np.testing.assert_allclose(other[5:], one[5:], atol=1e-9)


def test_a_constant_background_changes_the_statistics_of_its_rim_only():
    image = blob((1, 1, 160, 160)) + np.random.default_rng(2).normal(0, 0.05, (1, 1, 160, 160))
    padded = np.zeros((1, 1, 260, 260))
    padded[..., 50:210, 50:210] = image
    one, other = described(image), described(padded)
    assert other["noise level"] == pytest.approx(one["noise level"], abs=0.15)
    assert other["quantile 0.5"] == pytest.approx(one["quantile 0.5"], abs=0.1)


def test_channels_are_described_one_after_the_other_and_a_constant_one_is_finite():
    image = np.concatenate([blob(), np.full((1, 1, 80, 90), 2.0)])
    found = describe_acquisition(image)
    assert found.shape == (2 * len(FEATURES),) and np.isfinite(found).all()
    np.testing.assert_array_equal(found[: len(FEATURES)], describe_acquisition(blob()))


def clusters(*sizes, distance=6.0, seed=0):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(sizes), 5)) * distance
    return np.concatenate([random.normal(centre, 1, (size, 5)) for centre, size in zip(centres, sizes)])


@pytest.mark.parametrize("sizes", [(30, 12), (25, 20, 15), (15, 14, 13, 12)])
def test_clear_groups_are_found_the_largest_first(sizes):
    found = find_acquisition_groups(clusters(*sizes))
    assert found.groups.tolist() == [group for group, size in enumerate(sizes) for _ in range(size)]
    assert found.tried[len(sizes)].stability > 0.95 and found.plane.shape == (sum(sizes), 2)
    assert found.margin.min() > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [1, 10])
def test_one_round_or_long_group_is_one(seed, length):
    one = np.random.default_rng(seed).normal(size=(60, 5)) * [length, 1, 1, 1, 1]
    found = find_acquisition_groups(one)
    assert found.count == 1 and not found.margin.any()


@pytest.mark.parametrize("seed", range(5))
def test_one_skewed_group_is_one(seed):
    one = np.random.default_rng(seed).normal(size=(80, 5))
    one[:, :2] = 3 * np.exp(one[:, :2])
    assert find_acquisition_groups(one).count == 1


def test_a_given_number_of_groups_is_used_even_without_a_gap():
    found = find_acquisition_groups(np.random.default_rng(0).normal(size=(60, 5)) * [10, 1, 1, 1, 1], count=2)
    assert found.count == 2 and list(found.tried) == [2] and not found.tried[2].accepted
    assert found.margin.min() < 0.2
    assert find_acquisition_groups(np.zeros((30, 4)), count=3).count == 1


def test_few_cases_are_one_group_and_a_lonely_odd_image_is_none():
    assert find_acquisition_groups(clusters(10, 9)).count == 1
    assert find_acquisition_groups(np.zeros((30, 4))).count == 1
    odd = np.random.default_rng(0).normal(size=(40, 5))
    odd[7] += 100
    assert find_acquisition_groups(odd).count == 1


def test_the_order_of_cases_and_the_units_of_the_statistics_do_not_matter():
    cases = clusters(20, 15)
    order = np.random.default_rng(3).permutation(35)
    assert np.array_equal(find_acquisition_groups(cases[order]).groups, find_acquisition_groups(cases).groups[order])
    assert np.array_equal(find_acquisition_groups(cases * [1, 10, 0.1, 5, 2] + 3).groups,
                          find_acquisition_groups(cases).groups)


def standardised(image):
    return ((image - image.mean()) / image.std()).astype(np.float32)


def test_the_scanners_of_the_chest_x_rays_are_separated(real_images):
    with open(real_images / "cxr" / "meta.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))[::3]
    found = []
    for row in rows:
        image = io.imread(real_images / "cxr" / "images" / f"{row['case_id']}.png").astype(float)
        rows_in, columns_in = np.nonzero(image)
        image = image[rows_in.min() : rows_in.max() + 1, columns_in.min() : columns_in.max() + 1]
        found.append(describe_acquisition(standardised(image)[None, None]))
    scanners = np.array([row["scanner"] for row in rows])
    groups = find_acquisition_groups(np.stack(found)).groups
    # the pictures of Shenzhen are of two kinds, with a marker R or L
    assert groups.max() in (1, 2)
    right = sum(np.unique(scanners[groups == group], return_counts=True)[1].max() for group in range(3)
                if np.any(groups == group))
    assert right / len(rows) > 0.95
    assert adjusted_rand_score(scanners, find_acquisition_groups(np.stack(found), count=2).groups) > 0.85
    assert find_acquisition_groups(np.stack(found)[scanners == "eureka_cr"]).count == 1


def test_the_hippocampus_volumes_are_those_with_8_bits_and_the_others(real_images):
    found, types = [], []
    for file in sorted((real_images / "Dataset004_Hippocampus" / "imagesTr").glob("*.nii.gz")):
        image = nibabel.load(file)
        types.append(str(image.get_data_dtype()))
        found.append(describe_acquisition(standardised(image.get_fdata().transpose(2, 1, 0))[None]))
    types = np.array(types)
    assert adjusted_rand_score(types, find_acquisition_groups(np.stack(found)).groups) > 0.95
    assert find_acquisition_groups(np.stack(found)[types == "float32"]).count == 1
