"""Labels at points, and label maps in views."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.views import (
    ViewGeometry,
    apply_affine_labels,
    apply_affine_views,
    crop_size,
    draw_affine_views,
    read_labels,
    to_canonical,
)

FLAT = ViewGeometry((24, 32), (1.0, 2.5))
CUBE = ViewGeometry((12, 16, 10), (1.0, 0.8, 2.0))
THICK = ViewGeometry((8, 24, 32), (5.0, 1.0, 0.7))
GEOMETRIES = (FLAT, CUBE, THICK)
SETTINGS = ViewSettings()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_labels(size: tuple[int, ...], dtype: torch.dtype = torch.int16) -> torch.Tensor:
    return torch.randint(0, 100, size, generator=generator()).to(dtype)


def slow_labels(labels, points, spacing):
    """The label of the nearest of all voxel centres, or -1 beyond half a voxel from all of them."""
    centres = [[(k + 0.5 - n / 2) * h for k in range(n)] for n, h in zip(labels.shape, spacing)]
    found = []
    for point in points:
        distances = [[abs(x - c) for c in axis] for x, axis in zip(point, centres)]
        outside = any(min(along) > h / 2 for along, h in zip(distances, spacing))
        found.append(-1 if outside else labels[tuple(int(np.argmin(along)) for along in distances)])
    return found


@pytest.mark.parametrize("size, spacing", [((5, 7), (1.0, 1.0)), ((4, 9), (0.5, 3.0)), ((3, 6, 5), (5.0, 1.0, 0.7))])
def test_labels_at_points_agree_with_a_slow_search_for_the_nearest_voxel(size, spacing):
    labels = random_labels(size)
    extent = torch.tensor(size) * torch.tensor(spacing, dtype=torch.float64)
    points = 1.3 * extent * (torch.rand(500, len(size), generator=generator(1), dtype=torch.float64) - 0.5)
    got = read_labels(labels, points, spacing)
    assert got.dtype == torch.int64 and 0 < int((got == -1).sum()) < 400
    assert got.tolist() == slow_labels(labels.numpy(), points.numpy(), spacing)


@hypothesis_settings(max_examples=20, deadline=None)
@given(data=st.data(), dimensions=st.integers(2, 3), seed=st.integers(0, 10**6))
def test_labels_at_voxel_centres_are_the_label_map(data, dimensions, seed):
    size = data.draw(st.tuples(*[st.integers(1, 7)] * dimensions))
    spacing = data.draw(st.tuples(*[st.floats(0.1, 9)] * dimensions))
    labels = torch.randint(-2, 5, size, generator=generator(seed))
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5 - n / 2) * h for n, h in zip(size, spacing)]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    assert torch.equal(read_labels(labels, centres, spacing), labels)
    assert torch.equal(read_labels(labels, centres.float(), spacing), labels)


def test_the_crop_ends_at_the_faces_of_its_outermost_voxels():
    labels = torch.tensor([[1, 2], [3, 4]])
    points = torch.tensor([[-1.99, -0.99], [-2.01, -0.5], [1.99, 0.99], [1.0, 1.01], [torch.nan, 0.0]])
    assert read_labels(labels, points, (2.0, 1.0)).tolist() == [1, -1, 4, -1, -1]


def test_voxel_faces_are_located_in_double_precision():
    labels, spacing = torch.arange(8), (0.7,)
    faces = (torch.arange(1, 8, dtype=torch.float64) - 4) * 0.7
    for offset, first in ((-1e-10, 0), (1e-10, 1)):
        assert read_labels(labels, faces[:, None] + offset, spacing).tolist() == list(range(first, first + 7))


def test_points_outside_a_crop_of_one_voxel_have_no_label():
    assert read_labels(torch.tensor([[5]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]), (1.0, 1.0)).tolist() == [-1, 5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_type_and_any_number_of_leading_axes_can_be_read(dtype):
    labels = random_labels((5, 6), dtype)
    points = 4 * torch.rand(2, 3, 4, 2, generator=generator()) - 2
    got = read_labels(labels, points, (1.0, 1.0))
    assert got.shape == (2, 3, 4)
    assert torch.equal(got, read_labels(labels.long(), points.flatten(0, 2), (1.0, 1.0)).reshape(2, 3, 4))


def test_labels_that_are_no_integers_or_have_other_axes_than_the_points_are_an_error():
    with pytest.raises(ValueError, match="must be integers, found torch.float32"):
        read_labels(torch.zeros(4, 4), torch.zeros(3, 2), (1.0, 1.0))
    with pytest.raises(ValueError, match="same number of axes"):
        read_labels(torch.zeros(4, 4, 4, dtype=torch.int16), torch.zeros(3, 2), (1.0, 1.0))


def pixel_centres(geometry: ViewGeometry) -> torch.Tensor:
    axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in geometry.patch_size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_rendered_label_map_holds_the_label_read_at_each_pixels_canonical_point(geometry):
    size = crop_size(geometry, SETTINGS)
    labels = random_labels(size)
    matrices = draw_affine_views(generator(3), geometry, SETTINGS, 4)
    rendered = apply_affine_labels(labels.expand(4, 1, *size), matrices, geometry)
    assert rendered.dtype == labels.dtype and rendered.shape == (4, 1, *geometry.patch_size)
    points = to_canonical(pixel_centres(geometry), matrices)
    # float32 may take either voxel where a pixel lies on their common face
    place = points / torch.tensor(geometry.spacing) + torch.tensor(size) / 2
    clear = ((place - place.round()).abs() > 1e-4).all(-1)
    assert float(clear.float().mean()) > 0.95
    assert torch.equal(rendered.flatten(1)[clear].long(), read_labels(labels, points, geometry.spacing)[clear])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_rendered_map_lies_within_half_a_voxel_of_the_linear_view(geometry):
    # along each axis, voxel indices: linear interpolation gives the exact place, the nearest voxel is 1/2 away at most
    size = crop_size(geometry, SETTINGS)
    indices = torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij"))
    matrices = draw_affine_views(generator(4), geometry, SETTINGS, 3)
    for axis in indices:
        crops = axis.expand(3, 1, *size)
        exact = apply_affine_views(crops.double(), matrices, geometry)
        difference = apply_affine_labels(crops, matrices, geometry) - exact
        assert 0.4 < float(difference.abs().max()) <= 0.5 + 1e-4
        assert abs(float(difference.mean())) < 0.05


def test_ignored_labels_and_large_numbers_and_confidences_survive_rendering():
    matrices = draw_affine_views(generator(), CUBE, SETTINGS, 2)
    size = crop_size(CUBE, SETTINGS)
    for values in (torch.tensor([-1, 0, 2**24]), torch.tensor([0.0, 0.333, 1.0])):
        crops = values[torch.randint(3, (2, 1, *size), generator=generator())]
        rendered = apply_affine_labels(crops, matrices, CUBE)
        assert rendered.dtype == values.dtype and torch.equal(rendered.unique(), values)


def test_rendering_a_few_maps_at_a_time_changes_nothing(monkeypatch):
    matrices = draw_affine_views(generator(), CUBE, SETTINGS, 4)
    crops = random_labels((4, 1, *crop_size(CUBE, SETTINGS)))
    whole = apply_affine_labels(crops, matrices, CUBE)
    monkeypatch.setattr("nnunet_cfcl.views.geometry.POINTS_AT_ONCE", 1)
    assert torch.equal(apply_affine_labels(crops, matrices, CUBE), whole)


def test_the_identity_view_of_a_larger_map_is_its_middle():
    labels = random_labels((30, 36))
    half = torch.tensor(FLAT.extent) / 2
    view = torch.cat([half.diag(), torch.zeros(2, 1)], dim=1)
    assert torch.equal(apply_affine_labels(labels[None, None], view[None], FLAT)[0, 0], labels[3:-3, 2:-2])


def test_mirrored_maps_and_views_give_mirrored_renderings():
    labels = random_labels(crop_size(CUBE, SETTINGS))
    matrices = draw_affine_views(generator(5), CUBE, SETTINGS, 1)
    rendered = apply_affine_labels(labels[None, None], matrices, CUBE)
    for axes in itertools.chain([(0,), (1,), (2,)], [(0, 2)]):
        sign = torch.ones(3)
        sign[list(axes)] = -1
        mirrored = torch.cat([sign[:, None] * matrices[0, :, :3] * sign, (sign * matrices[0, :, 3])[:, None]], dim=1)
        again = apply_affine_labels(labels.flip(axes)[None, None], mirrored[None], CUBE)
        assert float((again.flip([axis + 2 for axis in axes]) == rendered).float().mean()) > 0.999
