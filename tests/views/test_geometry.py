"""Geometry of views: planes, crop size, matrices, cutting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.views import (
    ViewGeometry,
    apply_affine_views,
    check_patch,
    crop_size,
    draw_affine_views,
    overlap_share,
    to_canonical,
    to_view,
)

FLAT = ViewGeometry((24, 32), (1.0, 2.5))
CUBE = ViewGeometry((12, 16, 10), (1.0, 0.8, 2.0))
THICK = ViewGeometry((8, 24, 32), (5.0, 1.0, 0.7))
GEOMETRIES = (FLAT, CUBE, THICK)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_many(geometry: ViewGeometry, settings: ViewSettings, images: int, n_views: int = 2) -> torch.Tensor:
    source = generator()
    return torch.stack([draw_affine_views(source, geometry, settings, n_views) for _ in range(images)])


def identity_view(geometry: ViewGeometry) -> torch.Tensor:
    half = torch.tensor(geometry.extent) / 2
    return torch.cat([half.diag(), torch.zeros(len(half), 1)], dim=1)


@pytest.mark.parametrize("patch, spacing, planes", [
    ((24, 32), (1.0, 9.0), ((0, 1),)),
    ((32, 32, 32), (1.0, 1.0, 1.0), ((0, 1), (0, 2), (1, 2))),
    ((32, 96, 96), (1.0, 1.0, 1.0), ((0, 1), (0, 2), (1, 2))),
    ((31, 96, 96), (1.0, 1.0, 1.0), ((1, 2),)),
    ((14, 256, 256), (8.0, 1.5, 1.5), ((1, 2),)),
    ((32, 64, 64), (3.1, 1.0, 1.0), ((1, 2),)),
    ((32, 64, 64), (3.0, 1.0, 1.0), ((0, 1), (0, 2), (1, 2))),
    ((32, 64, 64), (1.0, 1.0, 4.0), ((0, 1),)),
])
def test_axes_rotate_only_where_patch_and_spacing_allow(patch, spacing, planes):
    assert ViewGeometry(patch, spacing).rotation_planes == planes


@pytest.mark.parametrize("patch, spacing", [
    ((8,), (1.0,)), ((8, 8), (1.0,)), ((8, 8, 8, 8), (1.0,) * 4), ((0, 8), (1.0, 1.0)), ((8, 8), (1.0, -1.0)),
    ((8, 8), (1.0, math.nan)), ((8, 8), (1.0, math.inf)),
])
def test_invalid_patches_and_spacings_are_rejected(patch, spacing):
    with pytest.raises(UserError, match="plan's configuration"):
        ViewGeometry(patch, spacing)


@pytest.mark.parametrize("patch, spacing", [
    ((14, 256, 256), (8.0, 1.5, 1.5)), ((20, 320, 256), (3.6, 0.6, 0.6)), ((40, 56, 40), (1.0,) * 3),
    ((112, 128), (1.0, 1.0)), ((6, 320, 320), (8.0, 1.0, 1.0)),
])
def test_patches_of_real_plans_are_large_enough(patch, spacing):
    check_patch(ViewGeometry(patch, spacing), ViewSettings())


@pytest.mark.parametrize("patch, spacing", [
    ((8, 8, 8), (1.0,) * 3), ((10, 64), (1.0, 1.0)), ((4, 64, 64), (8.0, 1.0, 1.0)),
])
def test_a_patch_too_small_is_rejected_with_a_sufficient_crop_fraction(patch, spacing):
    geometry = ViewGeometry(patch, spacing)
    with pytest.raises(UserError, match=r"views\.crop_fraction") as error:
        check_patch(geometry, ViewSettings())
    assert str(list(patch)) in str(error.value)
    advised = float(str(error.value).rsplit(" ", 1)[1])
    check_patch(geometry, ViewSettings(crop_fraction=(advised, 1.0)))


def test_a_patch_too_small_for_any_crop_fraction_is_rejected_with_the_advice_to_enlarge_it():
    with pytest.raises(UserError, match="larger patch"):
        check_patch(ViewGeometry((3, 64), (1.0, 1.0)), ViewSettings())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_without_rotation_the_crop_is_the_patch(geometry):
    assert crop_size(geometry, ViewSettings(rotation_deg=0)) == geometry.patch_size


@pytest.mark.parametrize("degrees", [1.0, 15.0, 90.0, 180.0])
def test_the_crop_in_2d_agrees_with_its_closed_form(degrees):
    reach = [(n - 1) * h for n, h in zip(FLAT.patch_size, FLAT.spacing)]
    for axis, other in ((0, 1), (1, 0)):
        angle = min(math.radians(degrees), math.atan2(reach[other], reach[axis]))
        largest = reach[axis] * math.cos(angle) + reach[other] * math.sin(angle)
        exact = math.ceil(largest / FLAT.spacing[axis] - 1e-9) + 1
        assert exact <= crop_size(FLAT, ViewSettings(rotation_deg=degrees))[axis] <= exact + 1


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_no_drawn_view_reads_outside_the_crop(geometry):
    settings = ViewSettings(crop_fraction=(0.3, 1.0))
    matrices = draw_many(geometry, settings, 30, n_views=50).double()
    size, spacing = torch.tensor(geometry.patch_size), torch.tensor(geometry.spacing)
    reach = (matrices[..., :-1].abs() * (1 - 1 / size)).sum(-1) + matrices[..., -1].abs()
    outermost = (torch.tensor(crop_size(geometry, settings)) - 1) * spacing / 2
    assert bool((reach <= outermost + 1e-5).all())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_crop_is_tight_within_two_voxels(geometry):
    settings = ViewSettings(crop_fraction=(1.0, 1.0), min_overlap=0)
    matrices = draw_many(geometry, settings, 10, n_views=100).double()
    size, spacing = torch.tensor(geometry.patch_size), torch.tensor(geometry.spacing)
    reach = (matrices[..., :-1].abs() * (1 - 1 / size)).sum(-1).flatten(0, 1).amax(0)
    assert bool((torch.tensor(crop_size(geometry, settings)) - (2 * reach / spacing + 1) < 2).all())


def test_thick_slices_stay_parallel_to_each_other():
    matrices = draw_many(THICK, ViewSettings(), 5, n_views=10)
    assert bool((matrices[..., 0, 1:3] == 0).all()) and bool((matrices[..., 1:, 0] == 0).all())
    assert crop_size(THICK, ViewSettings())[0] == THICK.patch_size[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_views_are_rotated_boxes_in_millimetres(geometry):
    linear = draw_many(geometry, ViewSettings(), 5, n_views=20).double()[..., :-1]
    rotation = linear / linear.norm(dim=-2, keepdim=True)
    identity = torch.eye(geometry.dimensions, dtype=torch.float64)
    torch.testing.assert_close(rotation.mT @ rotation, identity.expand_as(rotation), atol=1e-5, rtol=0)
    assert bool((rotation.det() > 0).all())


def test_rotation_angles_are_uniform_true_degrees_whatever_the_spacing():
    linear = draw_many(FLAT, ViewSettings(min_overlap=0), 20, n_views=50).double()[..., :-1]
    degrees = torch.rad2deg(torch.atan2(linear[..., 1, 0], linear[..., 0, 0])).flatten()
    assert stats.kstest(degrees.numpy(), stats.uniform(-15, 30).cdf).pvalue > 0.01


def test_in_3d_the_view_axes_turn_by_more_than_one_plane_but_stay_near_their_axes():
    linear = draw_many(CUBE, ViewSettings(), 10, n_views=50).double()[..., :-1]
    cosines = (linear / linear.norm(dim=-2, keepdim=True)).diagonal(dim1=-2, dim2=-1)
    # two or three rotations act on an axis; three of 15 degrees turn it by at most 23.7
    assert math.cos(math.radians(24)) < float(cosines.min()) < math.cos(math.radians(17))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_fraction_of_the_patch_is_uniform(geometry):
    settings = ViewSettings(min_overlap=0)
    linear = draw_many(geometry, settings, 20, n_views=50).double()[..., :-1]
    fraction = linear.det().flatten() * 2**geometry.dimensions / math.prod(geometry.extent)
    assert stats.kstest(fraction.numpy(), stats.uniform(0.08, 0.92).cdf).pvalue > 0.01


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_aspects_stay_in_range_and_no_axis_exceeds_the_patch(geometry):
    linear = draw_many(geometry, ViewSettings(), 15, n_views=50).double()[..., :-1]
    share = 2 * linear.norm(dim=-2) / torch.tensor(geometry.extent, dtype=torch.float64)
    assert float(share.max()) <= 1 + 1e-6
    for i, j in itertools.combinations(range(geometry.dimensions), 2):
        ratio = share[..., i] / share[..., j]
        assert 0.75 - 1e-6 <= float(ratio.min()) < 0.77 and 1.3 < float(ratio.max()) <= 4 / 3 + 1e-6


def test_aspects_of_small_views_are_log_uniform():
    linear = draw_many(FLAT, ViewSettings(crop_fraction=(0.08, 0.5), min_overlap=0), 20, n_views=50).double()[..., :-1]
    share = linear.norm(dim=-2) / torch.tensor(FLAT.extent, dtype=torch.float64)
    logs = (share[..., 0] / share[..., 1]).log().flatten()
    width = math.log(16 / 9)
    assert stats.kstest(logs.numpy(), stats.uniform(-width / 2, width).cdf).pvalue > 0.01


@pytest.mark.parametrize("fraction, aspect", [
    ((1.0, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (1.2, 2.0)), ((0.5, 0.5), (1.0, 1.0)),
])
def test_the_fraction_is_kept_where_the_aspect_does_not_fit(fraction, aspect):
    settings = ViewSettings(crop_fraction=fraction, aspect_ratio=aspect)
    for geometry in GEOMETRIES:
        linear = draw_many(geometry, settings, 2, n_views=20).double()[..., :-1]
        share = 2 * linear.norm(dim=-2) / torch.tensor(geometry.extent, dtype=torch.float64)
        assert float(share.max()) <= 1 + 1e-6
        assert fraction[0] - 1e-6 <= float(share.prod(-1).min()) and float(share.prod(-1).max()) <= fraction[1] + 1e-6


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("wanted", [0.1, 0.5])
def test_every_view_overlaps_view_0_by_the_share_asked_for(geometry, wanted):
    matrices = draw_many(geometry, ViewSettings(min_overlap=wanted), 10, n_views=11).double().numpy()
    rng = np.random.default_rng(0)
    for first, *others in matrices:
        for other in others:
            assert slow_overlap(rng, first, other) > wanted - 0.06


def slow_overlap(rng, a, b):
    """Monte Carlo in plain numpy."""
    small, large = sorted((a, b), key=lambda m: abs(np.linalg.det(m[:, :-1])))
    u = rng.uniform(-1, 1, (3000, len(a)))
    x = u @ small[:, :-1].T + small[:, -1]
    return (np.abs(np.linalg.solve(large[:, :-1], (x - large[:, -1]).T)) <= 1).all(0).mean()


def test_overlap_of_parallel_boxes_agrees_with_its_closed_form():
    big = torch.tensor([[10.0, 0, 0], [0, 6.0, 0]])
    small = torch.tensor([[2.0, 0, 9.0], [0, 2.0, -5.0]])
    exact = (3 / 4) * (3 / 4)  # 7..10 of 7..11 and -6..-3 of -7..-3
    assert float(overlap_share(big, small)) == pytest.approx(exact, abs=0.02)
    assert float(overlap_share(small, big)) == float(overlap_share(big, small))
    assert float(overlap_share(big, big)) == 1.0
    assert float(overlap_share(big, torch.tensor([[2.0, 0, 12.5], [0, 2.0, 0]]))) == 0.0


def test_an_overlap_no_candidate_reaches_by_chance_is_made_by_moving_the_view():
    settings = ViewSettings(crop_fraction=(0.08, 0.1), min_overlap=0.85, rotation_deg=2)
    matrices = draw_many(CUBE, settings, 4, n_views=20)
    assert bool((overlap_share(matrices[:, :1], matrices[:, 1:]) >= 0.85).all())
    size = torch.tensor(CUBE.patch_size)
    reach = (matrices[..., :-1].abs() * (1 - 1 / size)).sum(-1) + matrices[..., -1].abs()
    outermost = (torch.tensor(crop_size(CUBE, settings)) - 1) * torch.tensor(CUBE.spacing) / 2
    assert bool((reach <= outermost + 1e-5).all())


def test_draws_repeat_with_the_seed_and_consume_equal_numbers_for_any_settings():
    one, two = generator(3), generator(3)
    easy = draw_affine_views(one, CUBE, ViewSettings(), 4)
    assert torch.equal(easy, draw_affine_views(generator(3), CUBE, ViewSettings(), 4))
    assert not torch.equal(easy, draw_affine_views(generator(4), CUBE, ViewSettings(), 4))
    draw_affine_views(two, CUBE, ViewSettings(min_overlap=0.9, crop_fraction=(0.9, 1.0)), 4)
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))


def test_a_single_view_can_be_drawn():
    assert draw_affine_views(generator(), FLAT, ViewSettings(), 1).shape == (1, 2, 3)


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    dimensions=st.integers(2, 3), seed=st.integers(0, 10**6), degrees=st.floats(0, 180), low=st.floats(0.01, 1.0),
    data=st.data())
def test_any_geometry_and_setting_gives_views_inside_the_crop(dimensions, seed, degrees, low, data):
    patch = data.draw(st.tuples(*[st.integers(4, 60)] * dimensions))
    spacing = data.draw(st.tuples(*[st.floats(0.2, 6)] * dimensions))
    geometry, settings = ViewGeometry(patch, spacing), ViewSettings(rotation_deg=degrees, crop_fraction=(low, 1.0))
    matrices = draw_affine_views(generator(seed), geometry, settings, 5).double()
    reach = (matrices[..., :-1].abs() * (1 - 1 / torch.tensor(patch))).sum(-1) + matrices[..., -1].abs()
    outermost = (torch.tensor(crop_size(geometry, settings)) - 1) * torch.tensor(spacing, dtype=torch.float64) / 2
    assert bool((reach <= outermost + 1e-4).all())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_identity_view_returns_the_image(geometry):
    image = torch.randn(2, 3, *geometry.patch_size, generator=generator())
    view = identity_view(geometry).expand(2, -1, -1)
    torch.testing.assert_close(apply_affine_views(image, view, geometry), image, atol=1e-4, rtol=0)


def test_the_identity_view_of_a_larger_crop_is_its_middle():
    image = torch.randn(1, 1, 30, 36, generator=generator())
    view = apply_affine_views(image, identity_view(FLAT)[None], FLAT)
    torch.testing.assert_close(view, image[:, :, 3:-3, 2:-2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cut_views_agree_with_scipys_linear_interpolation(geometry):
    settings = ViewSettings()
    size = crop_size(geometry, settings)
    image = torch.randn(size, generator=generator(), dtype=torch.float64)
    matrix = draw_affine_views(generator(5), geometry, settings, 2)[1]
    got = apply_affine_views(image[None, None], matrix[None], geometry)[0, 0]
    axes = [(2 * np.arange(n) + 1) / n - 1 for n in geometry.patch_size]
    u = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(geometry.dimensions, -1)
    x = matrix[:, :-1].double().numpy() @ u + matrix[:, -1:].double().numpy()
    voxel = x / np.array(geometry.spacing)[:, None] + (np.array(size)[:, None] - 1) / 2
    expected = ndimage.map_coordinates(image.numpy(), voxel, order=1).reshape(geometry.patch_size)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def test_fifteen_degrees_are_fifteen_degrees_in_millimetres():
    angle, size = math.radians(15), (64, 40)
    millimetres = [(torch.arange(n) + 0.5 - n / 2) * h for n, h in zip(size, FLAT.spacing)]
    # the image grows along the direction that is 15 degrees off the first axis, in the patient
    image = (millimetres[0][:, None] * math.cos(angle) + millimetres[1] * math.sin(angle))[None, None]
    turned = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    view = torch.cat([turned * torch.tensor([8.0, 12.0]), torch.zeros(2, 1)], dim=1)
    got = apply_affine_views(image, view[None], FLAT)[0, 0]
    expected = 8.0 * ((2 * torch.arange(24) + 1) / 24 - 1)
    torch.testing.assert_close(got, expected[:, None].expand(24, 32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_batch_of_views_equals_views_one_by_one(geometry, monkeypatch):
    settings = ViewSettings()
    crops = torch.randn(4, 2, *crop_size(geometry, settings), generator=generator())
    matrices = draw_affine_views(generator(), geometry, settings, 4)
    batch = apply_affine_views(crops, matrices, geometry)
    singles = torch.cat([apply_affine_views(crops[i:i + 1], matrices[i:i + 1], geometry) for i in range(4)])
    assert torch.equal(batch, singles)
    monkeypatch.setattr("nnunet_cfcl.views.geometry.POINTS_AT_ONCE", 1)
    assert torch.equal(batch, apply_affine_views(crops, matrices, geometry))


def test_views_are_cut_in_full_precision_under_autocast():
    crops = torch.randn(2, 1, *crop_size(FLAT, ViewSettings()), generator=generator())
    matrices = draw_affine_views(generator(), FLAT, ViewSettings(), 2)
    plain = apply_affine_views(crops, matrices, FLAT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_affine_views(crops, matrices, FLAT), plain)
    half = apply_affine_views(crops.half(), matrices, FLAT)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), plain, atol=5e-3, rtol=0)


def test_a_mismatch_of_images_and_views_is_an_error():
    with pytest.raises(ValueError, match=r"found \(2, 1, 24, 32\) and \(3, 2, 3\)"):
        apply_affine_views(torch.zeros(2, 1, 24, 32), torch.zeros(3, 2, 3), FLAT)


@hypothesis_settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), which=st.integers(0, 2))
def test_to_view_and_to_canonical_are_inverse_to_each_other(seed, which):
    geometry = GEOMETRIES[which]
    matrices = draw_affine_views(generator(seed), geometry, ViewSettings(rotation_deg=180), 3)
    u = 2 * torch.rand(3, 20, geometry.dimensions, generator=generator(seed), dtype=torch.float64) - 1
    x = to_canonical(u, matrices)
    torch.testing.assert_close(to_view(x, matrices), u, atol=1e-12, rtol=0)
    torch.testing.assert_close(to_view(x.float(), matrices), u.float(), atol=1e-5, rtol=0)
    slow = [[m[:, :-1].double() @ p + m[:, -1] for p in points] for m, points in zip(matrices, u)]
    torch.testing.assert_close(x, torch.stack([torch.stack(row) for row in slow]), atol=1e-10, rtol=0)
