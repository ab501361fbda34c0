"""Points drawn class by class."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.views import (
    ClassBalance,
    ViewGeometry,
    apply_affine_views,
    crop_size,
    draw_affine_views,
    draw_corresponding_points,
    draw_view_points,
    read_features,
    read_labels,
    tissue_box,
    to_view,
)
from nnunet_cfcl.views.class_balance import draw_labelled
from nnunet_cfcl.views.read_region import read_region

FLAT = ViewGeometry((24, 32), (1.0, 2.5))
CUBE = ViewGeometry((12, 16, 10), (1.0, 0.8, 2.0))
THICK = ViewGeometry((8, 24, 32), (5.0, 1.0, 0.7))
GEOMETRIES = (FLAT, CUBE, THICK)
DRAWS = (draw_corresponding_points, draw_view_points)
SETTINGS = ViewSettings()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_crop(geometry: ViewGeometry) -> torch.Tensor:
    size = crop_size(geometry, SETTINGS)
    return tissue_box([0] * len(size), size, size, geometry.spacing)


def identity_views(geometry: ViewGeometry, count: int) -> torch.Tensor:
    half = torch.tensor(geometry.extent) / 2
    return torch.cat([half.diag(), torch.zeros(len(half), 1)], dim=1).expand(count, -1, -1)


def organs(geometry: ViewGeometry) -> torch.Tensor:
    """Class 1 one half of the crop, class 2 an organ of 2^D voxels in its middle, class 4 some voxels beside it."""
    size = crop_size(geometry, SETTINGS)
    labels = torch.zeros(size, dtype=torch.int16)
    labels[..., : size[-1] // 2] = 1
    labels[tuple(slice(n // 2 - 1, n // 2 + 1) for n in size)] = 2
    labels[(*(slice(n // 2 - 1, n // 2 + 1) for n in size[:-1]), slice(size[-1] // 2 + 2, size[-1] // 2 + 5))] = 4
    return labels


def counts(labels: torch.Tensor, points: torch.Tensor, geometry: ViewGeometry) -> list[dict[int, int]]:
    """Points of each label, per pair or view."""
    found = [read_labels(labels, part, geometry.spacing).tolist() for part in points]
    return [{c: part.count(c) for c in set(part)} for part in found]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("draw", DRAWS)
def test_every_class_in_the_crop_has_its_quota_however_small_it_is(draw, geometry):
    labels = organs(geometry)
    points, valid = draw(
        generator(), identity_views(geometry, 3), geometry, whole_crop(geometry), 400, ClassBalance(labels, 0.6))
    assert points.dtype == torch.float32 and points.shape[1:] == (400, geometry.dimensions) and bool(valid.all())
    plain, _ = draw(generator(), identity_views(geometry, 3), geometry, whole_crop(geometry), 400)
    for found, uniform in zip(counts(labels, points, geometry), counts(labels, plain, geometry), strict=True):
        assert all(found[c] >= 80 for c in (1, 2, 4)) and sum(found.values()) == 400
        # the other 160 points are uniform: about half of them lie in class 1, hardly any in the organs
        assert 80 + 50 < found[1] < 80 + 110 and uniform.get(2, 0) < 40


@pytest.mark.parametrize("draw", DRAWS)
def test_a_share_of_one_gives_equal_numbers_to_all_classes_and_none_to_the_background(draw):
    labels = organs(CUBE)
    points, valid = draw(
        generator(), identity_views(CUBE, 3), CUBE, whole_crop(CUBE), 100, ClassBalance(labels, 1.0))
    assert bool(valid.all())
    for found in counts(labels, points, CUBE):
        assert set(found) == {1, 2, 4} and sorted(found.values()) == [33, 33, 34]


def test_points_left_over_by_the_division_go_to_random_classes():
    labels = organs(FLAT)
    sampled = set()
    for seed in range(20):
        points, _ = draw_view_points(
            generator(seed), identity_views(FLAT, 1), FLAT, whole_crop(FLAT), 1, ClassBalance(labels, 1.0))
        sampled |= set(counts(labels, points, FLAT)[0])
    assert sampled == {1, 2, 4}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_balanced_points_are_read_from_real_image_in_all_their_views(draw, geometry):
    size, source = crop_size(geometry, SETTINGS), generator()
    low, high = [2] * len(size), [n - 3 for n in size]
    image = torch.ones(1, 1, *size)
    image[(..., *(slice(a, b) for a, b in zip(low, high)))] = 0.0
    labels = organs(geometry)
    matrices = draw_affine_views(source, geometry, SETTINGS, 4)
    box = tissue_box(low, high, size, geometry.spacing)
    points, valid = draw(source, matrices, geometry, box, 200, ClassBalance(labels, 0.9))
    views = apply_affine_views(image.expand(4, *image.shape[1:]), matrices, geometry)
    assert bool(valid.any()) and float(views.max()) > 0.5
    for group, (place, good) in enumerate(zip(points, valid)):
        for view in (group,) if draw is draw_view_points else (0, group + 1):
            coordinates = to_view(place[good], matrices[view])[None]
            assert bool((coordinates.abs() <= 1).all())
            assert float(read_features(views[view:view + 1], coordinates).max()) < 2e-5


def slow_candidates(labels, geometry, matrices, wanted, count=60_000):
    """Points of one class that lie inside all views, by rejection from the whole crop, one matrix at a time."""
    extent = np.array(labels.shape) * geometry.spacing / 2
    points = np.random.default_rng(0).uniform(-extent, extent, (count, geometry.dimensions))
    index = np.floor(points / geometry.spacing + np.array(labels.shape) / 2).astype(int)
    keep = labels.numpy()[tuple(index.T)] == wanted
    for matrix in matrices.double().numpy():
        u = np.linalg.solve(matrix[:, :-1], (points - matrix[:, -1]).T).T
        keep &= (np.abs(u) <= 1 - 1 / np.array(geometry.patch_size)).all(1)
    return points[keep]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("thickness", [2, 1000])
def test_points_of_a_class_are_uniform_in_it_where_both_views_see_it(geometry, thickness):
    # a layer of the crop is rare and looked up voxel by voxel, half of the crop is met by chance
    size = crop_size(geometry, SETTINGS)
    labels = torch.zeros(size, dtype=torch.int16)
    labels[..., size[-1] // 2 - 1:][..., :thickness] = 7
    matrices = draw_affine_views(generator(1), geometry, SETTINGS, 2)
    points, valid = draw_corresponding_points(
        generator(2), matrices, geometry, whole_crop(geometry), 1200, ClassBalance(labels, 1.0))
    slow = slow_candidates(labels, geometry, matrices, 7)
    assert bool(valid.all()) and counts(labels, points, geometry) == [{7: 1200}] and len(slow) > 100
    directions = np.random.default_rng(1).normal(size=(3, geometry.dimensions))
    for direction in np.concatenate([np.eye(geometry.dimensions), directions]):
        assert stats.ks_2samp(points[0].double().numpy() @ direction, slow @ direction).pvalue > 1e-3


@pytest.mark.parametrize("rows", [1, 4, 14])
def test_all_voxels_of_a_class_and_all_places_in_a_voxel_are_equally_likely(rows):
    # most points of 1 row are found voxel by voxel, all of 14 rows by chance, those of 4 rows by either
    labels = torch.zeros(crop_size(FLAT, SETTINGS), dtype=torch.int16)
    first = labels.shape[0] // 2 - 7
    labels[first:first + rows, 8:28] = 3
    points, _ = draw_view_points(
        generator(), identity_views(FLAT, 1), FLAT, whole_crop(FLAT), 3000, ClassBalance(labels, 1.0))
    place = points[0].double() / torch.tensor(FLAT.spacing) + torch.tensor(labels.shape) / 2
    voxel = ((place.floor() - torch.tensor([first, 8])) @ torch.tensor([20.0, 1.0], dtype=torch.float64)).long()
    assert stats.chisquare(voxel.bincount(minlength=20 * rows).numpy()).pvalue > 1e-3
    for axis in (0, 1):
        assert stats.kstest((place[:, axis] % 1).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("draw", DRAWS)
def test_the_points_that_are_not_balanced_are_uniform_over_the_views(draw):
    labels = organs(FLAT)
    points, _ = draw(generator(), identity_views(FLAT, 2), FLAT, whole_crop(FLAT), 4000, ClassBalance(labels, 0.25))
    background = points[0][read_labels(labels, points[0], FLAT.spacing) == 0].double().numpy()
    matrices = identity_views(FLAT, 1)
    slow = slow_candidates(labels, FLAT, matrices, 0)
    for direction in np.eye(2):
        assert stats.ks_2samp(background @ direction, slow @ direction).pvalue > 0.01
    # three quarters of the points, and the background's share of the views
    everywhere = sum(len(slow_candidates(labels, FLAT, matrices, c)) for c in (0, 1, 2, 4))
    assert len(background) == pytest.approx(3000 * len(slow) / everywhere, abs=120)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_no_share_and_no_foreground_are_the_unbalanced_draw(draw, geometry):
    matrices, box = draw_affine_views(generator(), geometry, SETTINGS, 3), whole_crop(geometry)
    plain = draw(generator(3), matrices, geometry, box, 60)
    empty = torch.zeros(crop_size(geometry, SETTINGS), dtype=torch.uint8)
    for balance in (ClassBalance(organs(geometry), 0.0), ClassBalance(empty, 0.5), ClassBalance(empty + 5, 0.5, 5)):
        again = draw(generator(3), matrices, geometry, box, 60, balance)
        assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


@pytest.mark.parametrize("draw", DRAWS)
def test_a_background_other_than_zero_is_no_class_and_zero_is_one(draw):
    labels = organs(FLAT)
    swapped = torch.where(labels == 0, 1, torch.where(labels == 1, 0, labels))
    points, _ = draw(
        generator(), identity_views(FLAT, 2), FLAT, whole_crop(FLAT), 90, ClassBalance(swapped, 1.0, background=1))
    assert counts(swapped, points, FLAT)[0] == {0: 30, 2: 30, 4: 30}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_ignored_places_are_never_chosen(draw, share, geometry):
    labels = organs(geometry)
    labels[..., ::3] = -1
    labels[0] = -7
    matrices = draw_affine_views(generator(1), geometry, SETTINGS, 4)
    points, valid = draw(generator(), matrices, geometry, whole_crop(geometry), 200, ClassBalance(labels, share))
    assert bool(valid.all())
    assert int(read_labels(labels, points, geometry.spacing).min()) >= 0


@pytest.mark.parametrize("draw", DRAWS)
def test_a_mostly_ignored_image_has_its_points_where_it_is_labelled(draw):
    # one background and one foreground voxel: rejection alone would find next to nothing
    labels = torch.full(crop_size(FLAT, SETTINGS), -1, dtype=torch.int16)
    middle = labels.shape[0] // 2
    labels[middle, 15], labels[middle + 1, 20] = 0, 1
    points, valid = draw(generator(), identity_views(FLAT, 2), FLAT, whole_crop(FLAT), 300, ClassBalance(labels, 0.5))
    assert bool(valid.all())
    found = counts(labels, points, FLAT)[0]
    # 150 of the class, and half of the other 150
    assert set(found) == {0, 1} and abs(found[0] - 75) < 30


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_where_everything_is_ignored_no_point_is_valid_and_all_are_finite(draw, share):
    labels = torch.full(crop_size(CUBE, SETTINGS), -1, dtype=torch.int16)
    matrices = draw_affine_views(generator(), CUBE, SETTINGS, 3)
    points, valid = draw(generator(), matrices, CUBE, whole_crop(CUBE), 50, ClassBalance(labels, share))
    assert points.shape == (3 if draw is draw_view_points else 2, 50, 3)
    assert bool(points.isfinite().all()) and not bool(valid.any())


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_class_of_one_voxel_has_its_quota_inside_this_voxel(draw, geometry):
    size = crop_size(geometry, SETTINGS)
    labels = torch.zeros(size, dtype=torch.int16)
    labels[tuple(n // 2 for n in size)] = 1
    points, valid = draw(
        generator(), identity_views(geometry, 2), geometry, whole_crop(geometry), 50, ClassBalance(labels, 1.0))
    centre = (torch.tensor([n // 2 for n in size]) + 0.5 - torch.tensor(size) / 2) * torch.tensor(geometry.spacing)
    assert bool(valid.all())
    assert bool(((points - centre).abs() <= torch.tensor(geometry.spacing) / 2 + 1e-6).all())


@pytest.mark.parametrize("draw", DRAWS)
def test_points_of_a_class_outside_the_views_are_drawn_uniformly(draw):
    labels = torch.zeros(crop_size(FLAT, SETTINGS), dtype=torch.int16)
    labels[0] = 1
    labels[labels.shape[0] // 2, 17] = 2
    points, valid = draw(
        generator(), identity_views(FLAT, 2), FLAT, whole_crop(FLAT), 2000, ClassBalance(labels, 1.0))
    assert bool(valid.all())
    found = counts(labels, points, FLAT)[0]
    assert set(found) == {0, 2} and 1000 <= found[2] < 1020
    elsewhere = points[0][read_labels(labels, points[0], FLAT.spacing) == 0].double().numpy()
    for direction in np.eye(2):
        slow = slow_candidates(labels, FLAT, identity_views(FLAT, 1), 0)
        assert stats.ks_2samp(elsewhere @ direction, slow @ direction).pvalue > 0.01


def test_a_class_that_one_pair_sees_and_the_other_does_not_is_balanced_in_the_first_alone():
    full = identity_views(FLAT, 1)[0]
    corner = torch.tensor([[4.0, 0, -7.5], [0, 12.0, -26.0]])
    labels = torch.zeros(crop_size(FLAT, SETTINGS), dtype=torch.int16)
    labels[20, 25] = 1
    points, valid = draw_corresponding_points(
        generator(), torch.stack([full, full, corner]), FLAT, whole_crop(FLAT), 100, ClassBalance(labels, 0.5))
    both, one = counts(labels, points, FLAT)
    assert bool(valid.all()) and both[1] >= 50 and one == {0: 100}


def test_a_class_cut_by_the_border_of_a_view_is_filled_from_its_inside():
    # the organ reaches from 3 mm off the view's middle to the end of the crop, the view's pixel centres to 3.83 mm
    view = torch.tensor([[4.0, 0, 0.0], [0, 30.0, 0.0]])
    size = crop_size(FLAT, SETTINGS)
    labels = torch.zeros(size, dtype=torch.int16)
    edge = size[0] // 2 + 3
    labels[edge:, 10:12] = 1
    points, valid = draw_view_points(
        generator(), view[None], FLAT, whole_crop(FLAT), 100, ClassBalance(labels, 0.5))
    inside = points[0][read_labels(labels, points[0], FLAT.spacing) == 1]
    assert bool(valid.all()) and len(inside) >= 50
    assert bool((inside[:, 0].abs() <= 4 * (1 - 1 / 24) + 1e-5).all())


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_repeat_with_the_seed_and_consume_one_number_for_any_labels(draw):
    matrices, box = draw_affine_views(generator(), CUBE, SETTINGS, 3), whole_crop(CUBE)
    balance = ClassBalance(organs(CUBE), 0.5)
    first = draw(generator(7), matrices, CUBE, box, 30, balance)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(generator(7), matrices, CUBE, box, 30, balance)))
    assert not torch.equal(first[0], draw(generator(8), matrices, CUBE, box, 30, balance)[0])
    with_labels, without = generator(7), generator(7)
    draw(with_labels, matrices, CUBE, box, 30, balance)
    draw(without, matrices, CUBE, box, 30)
    assert torch.equal(torch.rand(4, generator=with_labels), torch.rand(4, generator=without))


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), share=st.floats(0, 1), names=st.lists(st.integers(1, 120), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64]))
def test_points_do_not_depend_on_the_labels_of_the_classes_or_their_type(seed, share, names, dtype):
    names = list(itertools.accumulate(sorted(names), lambda a, b: max(a + 1, b)))
    labels = organs(FLAT)
    table = torch.zeros(5, dtype=torch.int64)
    table[[1, 2, 4]] = torch.tensor(names)
    renamed = table[labels.long()].to(dtype)
    matrices = draw_affine_views(generator(seed), FLAT, SETTINGS, 2)
    drawn = [
        draw_corresponding_points(generator(seed), matrices, FLAT, whole_crop(FLAT), 40, ClassBalance(each, share))
        for each in (labels, renamed)]
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


def test_invalid_shares_and_labels_are_errors():
    labels = torch.zeros(4, 4, dtype=torch.int16)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
            ClassBalance(labels, share)
    with pytest.raises(ValueError, match="must be integers, found torch.float32"):
        ClassBalance(labels.float(), 0.5)
    with pytest.raises(ValueError, match="at most 32766, found 40000"):
        ClassBalance(labels.int() + 40000, 0.5)
    with pytest.raises(ValueError, match="same number of axes"):
        draw_view_points(generator(), identity_views(CUBE, 1), CUBE, whole_crop(CUBE), 5, ClassBalance(labels, 0.5))


def test_no_further_labelled_points_are_drawn_in_a_crop_without_ignored_voxels():
    labels = organs(FLAT)
    region = read_region(identity_views(FLAT, 1).unsqueeze(1), FLAT, whole_crop(FLAT), labels)
    points, valid = draw_labelled(generator(), region, torch.tensor([3]))
    assert points.shape == (1, 0, 2) and valid.shape == (1, 0)
    ignored = read_region(identity_views(FLAT, 1).unsqueeze(1), FLAT, whole_crop(FLAT), labels - 1)
    assert int(draw_labelled(generator(), ignored, torch.tensor([3]))[1].sum()) == 3
