"""Corresponding points and feature reads."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from nnunet_cfcl.config import ViewSettings
from nnunet_cfcl.views import (
    ViewGeometry,
    apply_affine_views,
    crop_size,
    draw_affine_views,
    draw_corresponding_points,
    draw_view_points,
    read_features,
    tissue_box,
    to_view,
)

FLAT = ViewGeometry((24, 32), (1.0, 2.5))
CUBE = ViewGeometry((12, 16, 10), (1.0, 0.8, 2.0))
THICK = ViewGeometry((8, 24, 32), (5.0, 1.0, 0.7))
GEOMETRIES = (FLAT, CUBE, THICK)
SETTINGS = ViewSettings()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_crop(geometry: ViewGeometry, settings: ViewSettings = SETTINGS) -> torch.Tensor:
    size = crop_size(geometry, settings)
    return tissue_box([0] * len(size), size, size, geometry.spacing)


def identity_view(geometry: ViewGeometry) -> torch.Tensor:
    half = torch.tensor(geometry.extent) / 2
    return torch.cat([half.diag(), torch.zeros(len(half), 1)], dim=1)


def coordinate_image(size: tuple[int, ...], spacing: tuple[float, ...]) -> torch.Tensor:
    """(D, *size) whose channel a is the canonical coordinate in millimetres along axis a."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5 - n / 2) * h for n, h in zip(size, spacing)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).float()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(4))
def test_an_image_of_coordinates_comes_back_from_corresponding_points_of_two_views(geometry, seed):
    size, source = crop_size(geometry, SETTINGS), generator(seed)
    matrices = draw_affine_views(source, geometry, SETTINGS, 4)
    points, valid = draw_corresponding_points(source, matrices, geometry, whole_crop(geometry), 200)
    assert bool(valid.all())
    image = coordinate_image(size, geometry.spacing)
    views = apply_affine_views(image.expand(4, *image.shape), matrices, geometry)
    first = read_features(views[:1].expand(3, *views.shape[1:]), to_view(points, matrices[:1]))
    other = read_features(views[1:], to_view(points, matrices[1:]))
    pixel = (2 * matrices[..., :-1].norm(dim=-2) / torch.tensor(geometry.patch_size)).min()
    for read in (first, other):
        assert float((read - points).abs().max() / pixel) < 0.05 / 10
    assert float((first - other).abs().max() / pixel) < 0.05 / 10


def test_the_coordinate_test_would_notice_half_a_pixel():
    matrices = draw_affine_views(generator(), FLAT, SETTINGS, 2)
    points, _ = draw_corresponding_points(generator(), matrices, FLAT, whole_crop(FLAT), 200)
    image = coordinate_image(crop_size(FLAT, SETTINGS), FLAT.spacing)
    views = apply_affine_views(image.expand(2, *image.shape), matrices, FLAT)
    shifted = to_view(points, matrices[1:]) - 1 / torch.tensor(FLAT.patch_size)
    pixel = (2 * matrices[..., :-1].norm(dim=-2) / torch.tensor(FLAT.patch_size)).min()
    assert float((read_features(views[1:], shifted) - points).abs().mean() / pixel) > 0.2


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(6))
def test_reads_never_touch_padding(geometry, seed):
    # an image that is 1 in the padding: what is read is the share the padding has in it
    size, source = crop_size(geometry, SETTINGS), generator(seed)
    low, high = [2] * len(size), [n - 3 for n in size]
    low[-1] = size[-1] // 3
    image = torch.ones(1, 1, *size)
    image[(..., *(slice(a, b) for a, b in zip(low, high)))] = 0.0
    matrices = draw_affine_views(source, geometry, SETTINGS, 4)
    points, valid = draw_corresponding_points(
        source, matrices, geometry, tissue_box(low, high, size, geometry.spacing), 300)
    views = apply_affine_views(image.expand(4, *image.shape[1:]), matrices, geometry)
    assert bool(valid.any()) and float(views.max()) > 0.5
    for pair in range(3):
        for view in (0, pair + 1):
            coordinates = to_view(points[pair], matrices[view])[None]
            assert bool((coordinates.abs() <= 1)[0, valid[pair]].all())
            read = read_features(views[view:view + 1], coordinates)[0, valid[pair]]
            assert float(read.max()) < 2e-5


def test_a_view_aligned_with_the_voxels_uses_the_image_up_to_its_outermost_voxel():
    matrices = identity_view(THICK).expand(2, -1, -1)
    box = tissue_box([1, 0, 0], [7, 24, 32], THICK.patch_size, THICK.spacing)
    points, valid = draw_corresponding_points(generator(), matrices, THICK, box, 3000)
    assert bool(valid.all())
    assert float(points[..., 0].min()) == pytest.approx(-12.5, abs=0.05)
    assert float(points[..., 0].max()) == pytest.approx(12.5, abs=0.05)


def test_points_are_uniform_in_parallel_views():
    first = identity_view(FLAT)
    second = torch.tensor([[6.0, 0, 3.0], [0, 10.0, 20.0]])
    points, valid = draw_corresponding_points(generator(), torch.stack([first, second]), FLAT, whole_crop(FLAT), 4000)
    assert bool(valid.all())
    # the second view's pixel centres span 3 +- 5.75 and 20 +- 9.6875, all inside the first view's
    for axis, (low, width) in enumerate(((-2.75, 11.5), (10.3125, 19.375))):
        assert stats.kstest(points[0, :, axis].numpy(), stats.uniform(low, width).cdf).pvalue > 0.01


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(3))
def test_points_are_distributed_as_by_plain_rejection_from_the_whole_crop(geometry, seed):
    matrices = draw_affine_views(generator(seed), geometry, SETTINGS, 2)
    box = whole_crop(geometry)
    points, valid = draw_corresponding_points(generator(seed), matrices, geometry, box, 1500)
    candidates = np.random.default_rng(seed).uniform(box[0].numpy(), box[1].numpy(), (60_000, geometry.dimensions))
    keep = np.ones(len(candidates), bool)
    for matrix in matrices.double().numpy():
        u = np.linalg.solve(matrix[:, :-1], (candidates - matrix[:, -1]).T).T
        keep &= (np.abs(u) <= 1 - 1 / np.array(geometry.patch_size)).all(1)
    slow = candidates[keep]
    assert bool(valid.all()) and len(slow) > 100
    directions = np.random.default_rng(1).normal(size=(3, geometry.dimensions))
    for direction in np.concatenate([np.eye(geometry.dimensions), directions]):
        assert stats.ks_2samp(points[0].double().numpy() @ direction, slow @ direction).pvalue > 1e-3


def test_points_of_different_pairs_are_different_draws():
    matrices = identity_view(FLAT).expand(3, -1, -1)
    points, _ = draw_corresponding_points(generator(), matrices, FLAT, whole_crop(FLAT), 50)
    assert not bool((points[0] == points[1]).any())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_drawn_views_nearly_always_share_enough_points(geometry):
    source, box = generator(), whole_crop(geometry)
    filled = [
        draw_corresponding_points(source, draw_affine_views(source, geometry, SETTINGS, 4), geometry, box, 100)[1].all()
        for _ in range(15)]
    assert all(filled)


def test_views_that_share_nothing_give_no_valid_point_and_finite_ones():
    apart = torch.tensor([[[3.0, 0, -8.0], [0, 5.0, 0]], [[3.0, 0, 8.0], [0, 5.0, 0]]])
    points, valid = draw_corresponding_points(generator(), apart, FLAT, whole_crop(FLAT), 20)
    assert points.shape == (1, 20, 2) and bool(points.isfinite().all()) and not bool(valid.any())
    nothing = tissue_box([0, 0], [0, 0], crop_size(FLAT, SETTINGS), FLAT.spacing)
    points, valid = draw_corresponding_points(generator(), identity_view(FLAT).expand(2, -1, -1), FLAT, nothing, 20)
    assert bool(points.isfinite().all()) and not bool(valid.any())


def test_a_pair_without_points_does_not_spoil_the_others():
    matrices = torch.stack([identity_view(FLAT), identity_view(FLAT), torch.tensor([[2.0, 0, 50.0], [0, 2.0, 50.0]])])
    _, valid = draw_corresponding_points(generator(), matrices, FLAT, whole_crop(FLAT), 20)
    assert bool(valid[0].all()) and not bool(valid[1].any())


def test_draws_repeat_with_the_seed_and_use_up_the_same_numbers_however_hard_the_search():
    matrices = draw_affine_views(generator(), CUBE, SETTINGS, 3)
    one, two = generator(7), generator(7)
    easy, _ = draw_corresponding_points(one, matrices, CUBE, whole_crop(CUBE), 30)
    again, _ = draw_corresponding_points(generator(7), matrices, CUBE, whole_crop(CUBE), 30)
    assert torch.equal(easy, again)
    thin = tissue_box([0, 0, 4], [20, 20, 6], crop_size(CUBE, SETTINGS), CUBE.spacing)
    draw_corresponding_points(two, matrices, CUBE, thin, 500)
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_points_of_single_views_are_those_of_a_view_paired_with_itself(geometry):
    matrices = draw_affine_views(generator(), geometry, SETTINGS, 3)
    for view in matrices:
        pair = draw_corresponding_points(generator(1), torch.stack([view, view]), geometry, whole_crop(geometry), 50)
        alone = draw_view_points(generator(1), view[None], geometry, whole_crop(geometry), 50)
        torch.testing.assert_close(alone[0], pair[0])
        assert bool(alone[1].all()) and bool(pair[1].all())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_points_of_single_views_are_distributed_as_by_plain_rejection_from_the_whole_crop(geometry):
    matrices = draw_affine_views(generator(2), geometry, SETTINGS, 3)
    size = crop_size(geometry, SETTINGS)
    # padding on one side, so that tissue ends inside the views
    box = tissue_box([n // 3 for n in size], size, size, geometry.spacing)
    points, valid = draw_view_points(generator(2), matrices, geometry, box, 1500)
    assert points.shape == (3, 1500, geometry.dimensions) and bool(valid.all())
    candidates = np.random.default_rng(2).uniform(box[0].numpy(), box[1].numpy(), (40_000, geometry.dimensions))
    for view, matrix in zip(points.double().numpy(), matrices.double().numpy()):
        slow = candidates[slow_region(candidates, matrix, box.numpy(), geometry)]
        assert len(slow) > 100
        for direction in np.eye(geometry.dimensions):
            assert stats.ks_2samp(view @ direction, slow @ direction).pvalue > 1e-3


def slow_region(points, matrix, box, geometry):
    """Which points are read from tissue: the canonical places of all 2^D pixels around each, one by one."""
    size = np.array(geometry.patch_size)
    u = np.linalg.solve(matrix[:, :-1], (points - matrix[:, -1]).T).T
    keep = (np.abs(u) <= 1 - 1 / size).all(1)
    for corner in itertools.product((0, 1), repeat=geometry.dimensions):
        pixel = np.floor((u + 1) * size / 2 - 0.5) + corner
        place = ((2 * pixel + 1) / size - 1) @ matrix[:, :-1].T + matrix[:, -1]
        keep &= ((place >= box[0]) & (place <= box[1])).all(1)
    return keep


def test_points_of_single_views_never_touch_padding():
    size, source = crop_size(CUBE, SETTINGS), generator()
    low, high = [3] * 3, [n - 3 for n in size]
    image = torch.ones(1, 1, *size)
    image[(..., *(slice(a, b) for a, b in zip(low, high)))] = 0.0
    matrices = draw_affine_views(source, CUBE, SETTINGS, 4)
    points, valid = draw_view_points(source, matrices, CUBE, tissue_box(low, high, size, CUBE.spacing), 300)
    views = apply_affine_views(image.expand(4, *image.shape[1:]), matrices, CUBE)
    read = read_features(views, to_view(points, matrices))[..., 0]
    assert bool(valid.any()) and float(views.max()) > 0.5 and float(read[valid].max()) < 2e-5


def test_a_view_without_tissue_has_no_valid_point_and_does_not_spoil_the_others():
    away = torch.tensor([[2.0, 0, 50.0], [0, 2.0, 50.0]])
    points, valid = draw_view_points(
        generator(), torch.stack([identity_view(FLAT), away]), FLAT, whole_crop(FLAT), 20)
    assert bool(points.isfinite().all()) and bool(valid[0].all()) and not bool(valid[1].any())


def test_points_of_single_views_use_up_one_number_and_differ_between_views():
    one, two = generator(7), generator(7)
    points, _ = draw_view_points(one, identity_view(FLAT).expand(3, -1, -1), FLAT, whole_crop(FLAT), 50)
    torch.randint(2**62, (1,), generator=two)
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))
    assert not bool((points[0] == points[1]).any())


def test_a_tissue_box_spans_the_centres_of_the_real_voxels():
    box = tissue_box([0, 2], [4, 5], (4, 8), (2.0, 1.0))
    assert box.tolist() == [[-3.0, -1.5], [3.0, 0.5]]


def slow_read(features, coordinates):
    """Multilinear interpolation, one number at a time."""
    size, (n_images, n_points, d) = features.shape[2:], coordinates.shape
    out = np.zeros((n_images, n_points, features.shape[1]))
    for image, point, channel in itertools.product(*map(range, out.shape)):
        place = [min(max((coordinates[image, point, a] + 1) * size[a] / 2 - 0.5, 0), size[a] - 1) for a in range(d)]
        for corner in itertools.product((0, 1), repeat=d):
            index = tuple(min(int(p) + c, n - 1) for p, c, n in zip(place, corner, size))
            weight = math.prod((p - int(p)) if c else 1 - (p - int(p)) for p, c in zip(place, corner))
            out[(image, point, channel)] += weight * features[(image, channel, *index)]
    return out


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6), (1, 5, 2)])
def test_reads_agree_with_a_slow_oracle_inside_and_beyond_the_border(size):
    features = torch.randn(2, 3, *size, generator=generator(), dtype=torch.float64)
    coordinates = 2.4 * torch.rand(2, 40, len(size), generator=generator(1), dtype=torch.float64) - 1.2
    got = read_features(features, coordinates)
    np.testing.assert_allclose(got.numpy(), slow_read(features.numpy(), coordinates.numpy()), atol=1e-12)


@pytest.mark.parametrize("size", [(5, 7), (4, 3, 6)])
def test_a_read_at_a_pixel_centre_is_the_pixel(size):
    features = torch.randn(1, 2, *size, generator=generator())
    centres = torch.stack(torch.meshgrid(*[(2 * torch.arange(n) + 1) / n - 1 for n in size], indexing="ij"), -1)
    got = read_features(features, centres.flatten(0, -2)[None])
    torch.testing.assert_close(got.mT, features.flatten(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(5, 4), (3, 4, 3)])
def test_gradients_of_reads_are_exact(size):
    features = torch.randn(2, 2, *size, generator=generator(), dtype=torch.float64, requires_grad=True)
    coordinates = (1.6 * torch.rand(2, 5, len(size), generator=generator(1), dtype=torch.float64) - 0.8)
    assert torch.autograd.gradcheck(read_features, (features, coordinates.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_interpolated_in_float32(dtype):
    features = torch.randn(2, 4, 6, 5, 7, generator=generator()).to(dtype).requires_grad_()
    coordinates = 2 * torch.rand(2, 30, 3, generator=generator(1)) - 1
    got = read_features(features, coordinates)
    assert got.dtype == torch.float32
    assert torch.equal(got, read_features(features.float(), coordinates))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, read_features(features, coordinates))
    got.sum().backward()
    assert features.grad is not None and features.grad.dtype == dtype


def test_reads_of_a_batch_equal_reads_one_by_one():
    features = torch.randn(3, 4, 6, 5, generator=generator())
    coordinates = 2 * torch.rand(3, 30, 2, generator=generator(1)) - 1
    singles = [read_features(features[i:i + 1], coordinates[i:i + 1]) for i in range(3)]
    assert torch.equal(read_features(features, coordinates), torch.cat(singles))


def test_coordinates_that_do_not_fit_the_features_are_an_error():
    with pytest.raises(ValueError, match=r"expected coordinates \(2, K, 3\)"):
        read_features(torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 5, 2))
