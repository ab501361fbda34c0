"""What holds for views of any patch, any spacing (up to 1:30) and any settings."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.views import (
    IntensityParameters,
    ViewGeometry,
    apply_affine_views,
    apply_intensity,
    crop_size,
    draw_affine_views,
    draw_corresponding_points,
    draw_intensity,
    draw_view_points,
    read_features,
    tissue_box,
    to_canonical,
    to_view,
)

some = hypothesis_settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10**6)
#: Millimetres, evenly over the orders of magnitude: 1:10 and worse is as frequent as isotropic.
spacings = st.floats(math.log(0.3), math.log(9.0)).map(math.exp)


@st.composite
def geometries(draw) -> ViewGeometry:
    dimensions = draw(st.integers(2, 3))
    side = st.integers(6, 30) if dimensions == 2 else st.integers(5, 14)
    return ViewGeometry(draw(st.tuples(*[side] * dimensions)), draw(st.tuples(*[spacings] * dimensions)))


view_settings = st.builds(
    ViewSettings, rotation_deg=st.floats(0, 180), crop_fraction=st.floats(0.1, 1).map(lambda low: (low, 1.0)),
    min_overlap=st.floats(0, 0.5))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def identity_view(geometry: ViewGeometry) -> Tensor:
    half = torch.tensor(geometry.extent, dtype=torch.float64) / 2
    return torch.cat([half.diag(), torch.zeros(len(half), 1)], dim=1)


def coordinate_image(size: tuple[int, ...], spacing: tuple[float, ...]) -> Tensor:
    """(D, *size), channel a is the canonical coordinate in millimetres along axis a."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5 - n / 2) * h for n, h in zip(size, spacing)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def pixel(geometry: ViewGeometry, matrices: Tensor) -> Tensor:
    """The shortest side of a view's pixels in millimetres."""
    return (2 * matrices[..., :-1].double().norm(dim=-2) / torch.tensor(geometry.patch_size)).min()


@some
@given(geometry=geometries(), settings=view_settings, seed=seeds)
def test_a_point_of_the_patient_comes_back_from_every_view(geometry, settings, seed):
    matrices = draw_affine_views(generator(seed), geometry, settings, 4)
    extent = torch.tensor(geometry.extent, dtype=torch.float64)
    points = (torch.rand(4, 30, geometry.dimensions, generator=generator(seed), dtype=torch.float64) - 0.5) * extent
    found = to_canonical(to_view(points, matrices), matrices)
    torch.testing.assert_close(found, points, atol=1e-10 * float(extent.max()), rtol=0)


@some
@given(geometry=geometries(), settings=view_settings, seed=seeds)
def test_corresponding_points_of_two_views_show_the_same_place_of_the_patient(geometry, settings, seed):
    size = crop_size(geometry, settings)
    matrices = draw_affine_views(generator(seed), geometry, settings, 3)
    tissue = tissue_box([0] * len(size), size, size, geometry.spacing)
    points, valid = draw_corresponding_points(generator(seed), matrices, geometry, tissue, 40)
    image = coordinate_image(size, geometry.spacing)
    views = apply_affine_views(image.expand(3, *image.shape), matrices, geometry)
    for pair in range(2):
        chosen = points[pair, valid[pair]].double()
        for view in (0, pair + 1):
            read = read_features(views[view : view + 1], to_view(chosen, matrices[view])[None])[0]
            assert bool((read - chosen).abs().le(1e-3 * pixel(geometry, matrices)).all())


@some
@given(geometry=geometries(), settings=view_settings, seed=seeds, data=st.data())
def test_valid_points_are_read_from_real_voxels_alone(geometry, settings, seed, data):
    """The image is 1 in the padding and 0 elsewhere: what is read is the share that the padding has in it."""
    size = crop_size(geometry, settings)
    low = [data.draw(st.integers(0, n // 3)) for n in size]
    high = [n - data.draw(st.integers(0, n // 3)) for n in size]
    matrices = draw_affine_views(generator(seed), geometry, settings, 3)
    tissue = tissue_box(low, high, size, geometry.spacing)
    points, valid = draw_view_points(generator(seed), matrices, geometry, tissue, 60)
    assert bool(points.isfinite().all())
    image = torch.ones(3, 1, *size, dtype=torch.float64)
    image[(..., *(slice(*ends) for ends in zip(low, high)))] = 0.0
    views = apply_affine_views(image, matrices, geometry)
    for view in range(3):
        coordinates = to_view(points[view, valid[view]].double(), matrices[view])[None]
        assert bool((coordinates.abs() <= 1).all())
        assert not bool((read_features(views[view : view + 1], coordinates) > 2e-4).any())


@some
@given(geometry=geometries(), seed=seeds, margin=st.integers(0, 3), channels=st.integers(1, 4))
def test_the_identity_view_is_the_middle_of_the_crop(geometry, seed, margin, channels):
    size = tuple(n + 2 * margin for n in geometry.patch_size)
    crop = torch.randn(1, channels, *size, generator=generator(seed), dtype=torch.float64)
    middle = crop[(..., *(slice(margin, n - margin) for n in size))]
    view = apply_affine_views(crop, identity_view(geometry)[None], geometry)
    torch.testing.assert_close(view, middle, atol=1e-9, rtol=0)


@some
@given(geometry=geometries(), settings=view_settings, seed=seeds, data=st.data())
def test_a_mirrored_patient_in_a_mirrored_view_is_the_same_picture(geometry, settings, seed, data):
    axis = data.draw(st.integers(0, geometry.dimensions - 1))
    size = crop_size(geometry, settings)
    crop = torch.randn(2, 1, *size, generator=generator(seed), dtype=torch.float64)
    matrices = draw_affine_views(generator(seed), geometry, settings, 2).double()
    mirrored = matrices.clone()
    mirrored[:, axis] *= -1
    expected = apply_affine_views(crop, matrices, geometry)
    found = apply_affine_views(crop.flip(2 + axis), mirrored, geometry)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    turned = matrices.clone()
    turned[:, :, axis] *= -1  # the view's own axis runs the other way
    torch.testing.assert_close(
        apply_affine_views(crop, turned, geometry), expected.flip(2 + axis), atol=1e-9, rtol=0)


@some
@given(side=st.integers(6, 20), dimensions=st.integers(2, 3), turns=st.integers(1, 7), seed=seeds, data=st.data())
def test_quarter_turns_compose_to_those_of_the_array(side, dimensions, turns, seed, data):
    geometry = ViewGeometry((side,) * dimensions, (0.7,) * dimensions)
    i, j = data.draw(st.permutations(range(dimensions)))[:2]
    quarter = torch.eye(dimensions, dtype=torch.float64)
    quarter[i, i] = quarter[j, j] = 0
    quarter[i, j], quarter[j, i] = 1, -1
    view = identity_view(geometry)
    view[:, :-1] = torch.linalg.matrix_power(quarter, turns) @ view[:, :-1]
    crop = torch.randn(1, 1, *geometry.patch_size, generator=generator(seed), dtype=torch.float64)
    found = apply_affine_views(crop, view[None], geometry)
    torch.testing.assert_close(found, crop.rot90(turns, (2 + i, 2 + j)), atol=1e-9, rtol=0)


@some
@given(geometry=geometries(), settings=view_settings, seed=seeds)
def test_distances_in_a_view_are_millimetres_of_the_patient_in_all_directions(geometry, settings, seed):
    """A view's axes have the stated lengths, and two points have their Euclidean distance, whatever the
    spacing: a rotation of voxels instead of millimetres would shear anisotropic images."""
    (matrix,) = draw_affine_views(generator(seed), geometry, settings, 1).double()
    u = 2 * torch.rand(20, geometry.dimensions, generator=generator(seed), dtype=torch.float64) - 1
    half = matrix[:, :-1].norm(dim=0)
    straight = torch.cdist(u * half, u * half)
    in_patient = to_canonical(u, matrix)
    torch.testing.assert_close(torch.cdist(in_patient, in_patient), straight, rtol=1e-4, atol=1e-5 * float(half.max()))


@some
@given(
    geometry=geometries(), seed=seeds, channels=st.integers(1, 4), exponent=st.floats(-20, 30),
    outlier=st.floats(-1e30, 1e30))
def test_intensity_effects_keep_any_finite_image_finite(geometry, seed, channels, exponent, outlier):
    images = 10**exponent * torch.randn(4, channels, *geometry.patch_size, generator=generator(seed))
    images[(0, 0, *[0] * geometry.dimensions)] = outlier
    images[1] = outlier
    parameters = draw_intensity(generator(seed), ViewSettings(), 4, [False, True, True, True])
    found = apply_intensity(images, parameters, ViewSettings(), geometry.spacing)
    assert found.dtype == images.dtype and bool(found.isfinite().all())


@some
@given(geometry=geometries(), seed=seeds, gain=st.floats(0.01, 100), offset=st.floats(-100, 100))
def test_intensity_effects_do_not_depend_on_the_unit_of_the_image(geometry, seed, gain, offset):
    images = torch.randn(4, 1, *geometry.patch_size, generator=generator(seed), dtype=torch.float64)
    parameters = draw_intensity(generator(seed), ViewSettings(solarise_probability=0.5), 4, [True] * 4)
    found = apply_intensity(gain * images + offset, parameters, ViewSettings(), geometry.spacing)
    expected = gain * apply_intensity(images, parameters, ViewSettings(), geometry.spacing) + offset
    torch.testing.assert_close(found, expected, atol=1e-8 * max(gain, abs(offset), 1), rtol=0)


@some
@given(geometry=geometries(), seed=seeds, value=st.floats(-1e6, 1e6))
def test_a_constant_image_stays_what_it_is(geometry, seed, value):
    images = torch.full((4, 1, *geometry.patch_size), value, dtype=torch.float64)
    drawn = draw_intensity(generator(seed), ViewSettings(), 4, [True] * 4)
    strong = IntensityParameters(drawn.brightness, drawn.contrast, drawn.blur_sigma, torch.ones(4, dtype=torch.bool))
    found = apply_intensity(images, strong, ViewSettings(), geometry.spacing)
    torch.testing.assert_close(found, images, atol=1e-9 * max(1.0, abs(value)), rtol=0)
