"""The smallest ellipse against known ones, its optimality conditions and a general solver."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize, nnls

from nnunet_cfcl.chromap.ellipse import THINNEST, minimum_volume_enclosing_ellipse

FINE = 1e-10


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def forms(points, ellipse):
    offsets = np.asarray(points) - ellipse[0]
    return np.einsum("ij,jk,ik->i", offsets, ellipse[1], offsets)


def volume(ellipse):
    return np.linalg.det(ellipse[1]) ** -0.5


def half_axes(ellipse):
    return np.linalg.eigvalsh(ellipse[1])[::-1] ** -0.5


def on_a_circle(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def clouds(seed):
    """Clouds of many shapes and sizes in the plane."""
    x, angles = random(400, 2, seed=seed), np.random.default_rng(seed).uniform(0, 2 * math.pi, 400)
    circle = on_a_circle(angles)
    return {
        "gaussian": x, "few": x[:5], "three": x[:3], "square": x.clip(-1, 1), "circle": circle,
        "single_precision_circle": circle.astype(np.float32).astype(float), "disc": circle * x[:, :1],
        "heavy_tails": x**3, "thin": x * [1, 1e-3] @ [[0.6, 0.8], [-0.8, 0.6]], "far": x + 1e6,
        "clusters": x * 0.1 + 5 * x[np.arange(400) % 7], "grid": x.round(), "banana": np.c_[x[:, 0], x[:, 0] ** 2],
    }


NAMES = list(clouds(0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_every_point_is_inside_and_one_is_on_the_boundary(name, seed):
    points = clouds(seed)[name]
    found = forms(points, minimum_volume_enclosing_ellipse(points))
    assert found.max() <= 1
    assert found.max() >= 1 - 1e-6


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4).flatmap(lambda d: st.integers(1, 12).flatmap(lambda n: arrays(
    np.float64, (n, d), elements=st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1.0, 1e90, -1e90, 1e-90])))),
    st.sampled_from([0.3, 0.8, 1.0]))
def test_whatever_the_points_the_ellipse_is_finite_and_has_the_wanted_share_inside(points, coverage):
    centre, matrix = minimum_volume_enclosing_ellipse(points, coverage)
    assert np.isfinite(centre).all() and np.isfinite(matrix).all()
    assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) > 0).all()
    assert (forms(points, (centre, matrix)) <= 1).sum() >= math.ceil(coverage * len(points))


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 12, 101])
def test_a_regular_polygon_has_its_circumcircle(count):
    points = 2.5 * on_a_circle(0.3 + np.arange(count) * 2 * math.pi / count) + [3, -1]
    ellipse = minimum_volume_enclosing_ellipse(points)
    np.testing.assert_allclose(ellipse[0], [3, -1], atol=1e-6)
    np.testing.assert_allclose(ellipse[1], np.eye(2) / 2.5**2, atol=1e-6)


def test_the_unit_square_has_the_circle_through_its_corners_whatever_lies_within():
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    points = np.r_[corners, np.random.default_rng(0).uniform(size=(100, 2))]
    centre, matrix = minimum_volume_enclosing_ellipse(points)
    np.testing.assert_allclose(centre, [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(matrix, np.eye(2) / 0.5, atol=1e-5)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_a_simplex_has_its_steiner_ellipsoid(dimensions):
    points = random(dimensions + 1, dimensions, seed=dimensions)
    centre, matrix = minimum_volume_enclosing_ellipse(points, tolerance=FINE)
    offsets = points - points.mean(axis=0)
    np.testing.assert_allclose(centre, points.mean(axis=0), atol=1e-8)
    np.testing.assert_allclose(np.linalg.inv(matrix), dimensions * offsets.T @ offsets / len(points), rtol=1e-6)


def test_points_on_an_ellipse_have_that_ellipse():
    shape = np.array([[3.0, 1.0], [0.2, 0.5]])
    points = on_a_circle(np.linspace(0, 6, 300)) @ shape.T + [10, 20]
    centre, matrix = minimum_volume_enclosing_ellipse(points, tolerance=FINE)
    np.testing.assert_allclose(centre, [10, 20], atol=1e-6)
    np.testing.assert_allclose(np.linalg.inv(matrix), shape @ shape.T, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_optimality_conditions_hold_with_nonnegative_weights_of_points_on_the_boundary(name):
    points = clouds(7)[name]
    centre, matrix = minimum_volume_enclosing_ellipse(points, tolerance=FINE)
    root = np.linalg.cholesky(matrix)
    ball = (points - centre) @ root
    touching = ball[(ball**2).sum(axis=1) > 1 - 1e-6]
    # John: weighted, the points that touch the unit ball have the mean zero and the moments of the identity
    rows = np.c_[touching, touching[:, 0] ** 2, touching[:, 1] ** 2, touching[:, 0] * touching[:, 1]]
    weights, residual = nnls(rows.T, np.array([0, 0, 1, 1, 0.0]))
    assert residual < 1e-5
    assert weights.sum() == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_a_general_solver_finds_the_same_area(seed):
    points = random(12, 2, seed=seed) * [2, 0.5]

    def margins(x):
        return 1 - ((points @ np.array([[x[0], x[1]], [0, x[2]]]) + x[3:]) ** 2).sum(axis=1)

    start = np.array([0.1, 0, 0.1, 0, 0])
    slow = minimize(lambda x: -math.log(x[0] * x[2]), start, method="SLSQP", bounds=[(1e-6, None), (None, None)] * 2
                    + [(None, None)], constraints={"type": "ineq", "fun": margins},
                    options={"ftol": 1e-10, "maxiter": 1000})  # finer ones end in rounding on some processors
    assert slow.success
    found = volume(minimum_volume_enclosing_ellipse(points))
    assert found == pytest.approx(math.exp(slow.fun), rel=1e-5)


@pytest.mark.parametrize("dimensions", [2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_the_default_tolerance_is_within_a_thousandth_of_the_least_volume(dimensions, seed):
    for points in (random(500, dimensions, seed=seed), random(500, dimensions, seed=seed) ** 3):
        best = volume(minimum_volume_enclosing_ellipse(points, tolerance=1e-12))
        assert volume(minimum_volume_enclosing_ellipse(points)) == pytest.approx(best, rel=1e-5)
        assert volume(minimum_volume_enclosing_ellipse(points, tolerance=0.1)) >= best * (1 - 1e-9)


@pytest.mark.parametrize("coverage", [1.0, 0.95, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_an_affine_map_of_the_points_maps_the_ellipse(coverage, seed):
    points = random(300, 2, seed=seed)
    linear, shift = random(2, 2, seed=seed + 10) * [[1], [50]], np.array([30.0, -4.0])
    centre, matrix = minimum_volume_enclosing_ellipse(points, coverage, FINE)
    other_centre, other = minimum_volume_enclosing_ellipse(points @ linear.T + shift, coverage, FINE)
    np.testing.assert_allclose(other_centre, linear @ centre + shift, atol=1e-5)
    np.testing.assert_allclose(linear.T @ other @ linear, matrix, atol=1e-5)


@pytest.mark.parametrize("coverage", [1.0, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_neither_the_order_nor_the_repetition_of_points_matters(name, coverage):
    points = clouds(3)[name]
    ellipse = minimum_volume_enclosing_ellipse(points, coverage, FINE)
    shuffled = np.random.default_rng(1).permutation(np.r_[points, points])
    for other in (points[::-1], shuffled):
        centre, matrix = minimum_volume_enclosing_ellipse(other, coverage, FINE)
        np.testing.assert_allclose(centre, ellipse[0], atol=1e-5 * half_axes(ellipse)[-1])
        np.testing.assert_allclose(matrix, ellipse[1], atol=1e-5 * np.abs(ellipse[1]).max())


def test_unequal_repetition_changes_nothing_without_trimming():
    points = random(50, 2)
    centre, matrix = minimum_volume_enclosing_ellipse(points, tolerance=FINE)
    other = minimum_volume_enclosing_ellipse(np.repeat(points, np.arange(50) + 1, axis=0), tolerance=FINE)
    np.testing.assert_allclose(other[0], centre, atol=1e-6)
    np.testing.assert_allclose(other[1], matrix, atol=1e-6)


@pytest.mark.parametrize("point", [[0.0, 0.0], [3.0, -40.0]])
@pytest.mark.parametrize("count", [1, 5])
def test_a_single_point_has_a_small_round_ellipse_however_often_it_comes(point, count):
    ellipse = minimum_volume_enclosing_ellipse([point] * count)
    np.testing.assert_allclose(ellipse[0], point)
    np.testing.assert_allclose(half_axes(ellipse), 1e-9 * (max(map(abs, point)) or 1))


@pytest.mark.parametrize("count", [2, 3, 40])
def test_points_on_a_line_have_a_needle_with_both_ends_on_its_boundary(count):
    direction = np.array([0.6, 0.8])
    points = np.linspace(-5, 5, count)[:, None] * direction + [1, 2]
    ellipse = minimum_volume_enclosing_ellipse(points)
    np.testing.assert_allclose(ellipse[0], [1, 2], atol=1e-8)
    np.testing.assert_allclose(half_axes(ellipse), [5 * THINNEST, 5], rtol=1e-4)
    assert forms(points, ellipse).max() <= 1
    assert direction @ ellipse[1] @ direction == pytest.approx(1 / 25, rel=1e-4)


def test_fewer_points_than_dimensions_have_their_ellipsoid_in_the_plane_they_span():
    points = np.zeros((3, 4))
    points[:, [1, 3]] = 2 * on_a_circle(np.arange(3) * 2 * math.pi / 3)
    np.testing.assert_allclose(half_axes(minimum_volume_enclosing_ellipse(points)), [2e-5, 2e-5, 2, 2], rtol=1e-4)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("name", NAMES)
def test_trimming_keeps_the_wanted_number_of_points_and_makes_the_ellipse_no_larger(name, coverage):
    points = clouds(5)[name]
    ellipse = minimum_volume_enclosing_ellipse(points, coverage)
    assert (forms(points, ellipse) <= 1).sum() >= math.ceil(coverage * len(points))
    assert volume(ellipse) <= volume(minimum_volume_enclosing_ellipse(points)) * (1 + 1e-4)


@pytest.mark.parametrize("coverage", [0.9, 0.95, 0.99])
def test_of_a_gaussian_cloud_few_more_than_the_wanted_number_are_kept(coverage):
    points = random(2000, 2)
    inside = (forms(points, minimum_volume_enclosing_ellipse(points, coverage)) <= 1).sum()
    # points on the boundary are at equal distance: up to five of them stay together
    assert coverage * 2000 <= inside <= coverage * 2000 + 4


def test_outliers_that_are_scattered_or_in_a_heap_are_left_out():
    inner = on_a_circle(np.arange(950) * 0.7) * np.sqrt(np.linspace(0.01, 1, 950))[:, None]
    heap = 0.1 * random(50, 2) + [10, 3]
    scattered = on_a_circle(np.arange(50) * 0.9) * np.linspace(3, 200, 50)[:, None]
    best = minimum_volume_enclosing_ellipse(inner)
    for outliers in (heap, scattered):
        centre, matrix = minimum_volume_enclosing_ellipse(np.r_[inner, outliers], 0.95)
        np.testing.assert_allclose(centre, best[0], atol=1e-5)
        np.testing.assert_allclose(matrix, best[1], atol=1e-5)


def test_a_heap_of_equal_points_is_kept_together():
    points = np.r_[np.full((95, 2), 7.0), random(5, 2)]
    ellipse = minimum_volume_enclosing_ellipse(points, 0.9)
    np.testing.assert_allclose(ellipse[0], [7, 7])
    assert (forms(points, ellipse) <= 1).sum() == 95


@pytest.mark.parametrize("points, text", [
    ([1.0, 2.0], "shape"), (np.zeros((0, 2)), "shape"), (np.zeros((3, 0)), "shape"), (np.zeros((2, 2, 2)), "shape"),
    ([[0, np.nan]], "finite"), ([[0, np.inf]], "finite"), ([[0, -1e200]], "finite"), ([[1, 2], [3]], "numbers"),
    ([["a", "b"]], "numbers"),
])
def test_points_that_are_none_are_refused_in_a_readable_line(points, text):
    with pytest.raises(ValueError, match=text):
        minimum_volume_enclosing_ellipse(points)


@pytest.mark.parametrize("name", ["coverage", "tolerance"])
@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        minimum_volume_enclosing_ellipse([[0, 0], [1, 1]], **{name: value})


def test_the_points_of_the_caller_stay_as_they_are():
    points = random(100, 2)
    before = points.copy()
    minimum_volume_enclosing_ellipse(points, 0.9)
    assert np.array_equal(points, before)
