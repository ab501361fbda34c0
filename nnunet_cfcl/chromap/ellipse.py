"""The smallest ellipse around a cloud of points, with or without its outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

LARGEST_COORDINATE = 1e100
"""Greatest coordinate: products of larger squares would overflow."""

SMALLEST_CLOUD = 1e-100
"""A cloud whose coordinates are all smaller has `LEAST_HALF_AXIS` as its least half-axis, not a share of its size."""

THINNEST = 1e-5
"""Least half-axis relative to the longest one; thinner, a quadratic form in float64 has no digits to test with."""

LEAST_HALF_AXIS = 1e-9
"""Least half-axis relative to the largest coordinate."""

# a direction in which the cloud reaches less far than this share of its extent is left out of the search
_FLAT = 1e-12
# the same distance to rounding, whatever the coordinates: such points stay or go together
_TIE = 1e-7
_TRIM_TOLERANCE = 1e-10
_ROUNDS, _STEPS, _CONCENTRATIONS = 500, 1000, 100

Array = NDArray[np.float64]


def minimum_volume_enclosing_ellipse(
    points: ArrayLike, coverage: float = 1.0, tolerance: float = 1e-6
) -> tuple[Array, Array]:
    """Compute the ellipse (ellipsoid) {p: (p - centre)' A (p - centre) <= 1} of least volume around the points.

    Khachiyan's problem is solved by Frank-Wolfe steps with away steps (Todd & Yildirim 2007, "On Khachiyan's algorithm
    for the computation of minimum-volume enclosing ellipsoids"), each followed by a Newton step, on a core set: a few
    points, to which the outermost points of the whole cloud are added until none lies outside. The result is then
    scaled so that rounding puts no point outside. To the tolerance it does not depend on the order and (at coverage 1)
    the repetition of the points, and an affine map of the points maps the ellipse.

    The exception are clouds that no ellipse with a volume fits: a half-axis is at least `THINNEST` of the longest one
    and `LEAST_HALF_AXIS` of the largest coordinate (of 1 where all are zero). Points on a line get a needle, a single
    point gets a small ball, and the points are inside.

    With ``coverage`` < 1 the ellipse is that of a subset, found by concentration steps: an ellipse, its nearest points
    by Mahalanobis distance, their ellipse, and so on, which never makes it larger (Rousseeuw & Van Driessen 1999, "A
    fast algorithm for the minimum covariance determinant estimator"). They start once from mean and covariance and
    once from the ellipse of all points; the smaller result counts. No random numbers are drawn and each step is
    affinely equivariant. It is a local minimum: another subset of the size may have a smaller ellipse.

    Args:
        points: (N, d), N and d >= 1, finite and not beyond `LARGEST_COORDINATE`.
        coverage: share of the points that must be inside, in (0, 1]: at least ceil(coverage N) are; points at equal
            distance stay or go together, so that their order does not matter: all points on the boundary (in the plane
            mostly three to five) stay, even where fewer would do.
        tolerance: relative duality gap, in (0, 1): the volume is at most (1 + tolerance)^((d + 1) / 2) times the least
            one (with coverage 1). Below about 1e-12 rounding ends the search.

    Returns:
        centre (d,) and A (d, d), symmetric and positive definite, both float64.

    Raises:
        ValueError: wrong shape, no points, values that are not finite or too large, coverage or tolerance out of range.
    """
    cloud = _checked(points, coverage, tolerance)
    wanted = math.ceil(coverage * cloud.shape[1])
    if wanted < cloud.shape[1]:
        cloud = cloud[:, _concentrated(cloud, wanted)]
    return _enclosing(cloud, tolerance)


def _checked(points: ArrayLike, coverage: float, tolerance: float) -> Array:
    """(d, N): a coordinate in a row makes every pass over the points several times faster."""
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"points must be an array of numbers (N, d): {error}") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"points must have the shape (N, d) with N and d at least 1, found {array.shape}")
    cloud = np.ascontiguousarray(array.T)
    # a NaN fails the comparison too
    if not (cloud.min() >= -LARGEST_COORDINATE and cloud.max() <= LARGEST_COORDINATE):
        raise ValueError(f"points must be finite and within +-{LARGEST_COORDINATE:g}, found a value that is not")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, found {coverage}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, found {tolerance}")
    return cloud


@dataclass(frozen=True)
class _Frame:
    """Affine coordinates in which d + 1 points of the cloud are a unit simplex and the others are not far from it.

    In a flat cloud the rank r takes the place of d. ``coordinates`` (r, N) times ``sides`` (d, r) plus ``origin`` (d,)
    are the points; ``corners`` are the indices of the simplex.
    """

    origin: Array
    sides: Array
    coordinates: Array
    corners: list[int]

    @staticmethod
    def of(cloud: Array) -> _Frame:
        """Each corner is the point farthest from those before (pivoted Gram-Schmidt), so thin clouds keep digits."""
        first = _farthest(cloud - (cloud.min(axis=1) + cloud.max(axis=1))[:, None] / 2)
        rest = cloud - cloud[:, first, None]
        corners, basis, rows = [first], np.zeros((len(cloud), 0)), np.zeros((0, cloud.shape[1]))
        extent = 0.0
        for _ in range(len(cloud)):
            corner = _farthest(rest)
            length = float(np.linalg.norm(rest[:, corner]))
            extent = max(extent, length)
            if length <= _FLAT * extent:
                break
            direction = rest[:, corner] / length
            row = direction @ rest
            rest -= direction[:, None] * row
            corners.append(corner)
            basis, rows = np.column_stack([basis, direction]), np.vstack([rows, row])
        simplex = rows[:, corners[1:]]
        return _Frame(cloud[:, first], basis @ simplex, np.linalg.inv(simplex) @ rows, corners)


def _farthest(offsets: Array) -> int:
    return int(np.einsum("ij,ij->j", offsets, offsets).argmax())


def _forms(offsets: Array, matrix: Array) -> Array:
    forms: Array = np.einsum("ij,ij->j", matrix @ offsets, offsets)
    return forms


def _enclosing(cloud: Array, tolerance: float) -> tuple[Array, Array]:
    frame = _Frame.of(cloud)
    lifted = np.vstack([np.ones(cloud.shape[1]), frame.coordinates])
    chosen, weights = _optimal_weights(lifted, frame.corners, tolerance)
    core = frame.coordinates[:, chosen]
    mean = core @ weights
    # the inverse of A is the rank times the weighted covariance of the core set
    root = frame.sides @ (core - mean[:, None]) * np.sqrt(weights * len(core))
    centre = frame.origin + frame.sides @ mean
    matrix = _inverse_of_widened(root @ root.T, float(np.abs(cloud).max()))
    return centre, matrix / _largest_form(cloud - centre[:, None], matrix)


def _inverse_of_widened(shape: Array, size: float) -> Array:
    squares, axes = np.linalg.eigh(shape)
    least = LEAST_HALF_AXIS * (size if size > SMALLEST_CLOUD else 1.0)
    inverse: Array = (axes / np.maximum(squares, max(THINNEST**2 * squares[-1], least**2))) @ axes.T
    return (inverse + inverse.T) / 2


def _largest_form(offsets: Array, matrix: Array) -> float:
    """At least 1, and above any value that rounding can make of the form in another order of summation."""
    bound = _forms(np.abs(offsets), np.abs(matrix)).max()
    return max(1.0, float(_forms(offsets, matrix).max() + 4 * (len(offsets) + 2) * np.finfo(np.float64).eps * bound))


def _optimal_weights(lifted: Array, start: list[int], tolerance: float) -> tuple[NDArray[np.intp], Array]:
    """A core set and its weights (the dual solution) in the D-optimal design of points (1, x), lifted (d + 1, N)."""
    chosen = np.array(start, dtype=np.intp)
    weights = np.full(len(chosen), 1 / len(chosen))
    for _ in range(_ROUNDS):
        weights = _design_of_few(lifted[:, chosen], weights, tolerance)
        white = _whitening(lifted[:, chosen], weights) @ lifted
        variances = np.einsum("ij,ij->j", white, white)
        outside = np.flatnonzero(variances > len(lifted) * (1 + tolerance))
        new = np.setdiff1d(_outermost(white[:, outside], variances[outside], outside), chosen)
        if not len(new):
            break
        chosen = np.append(chosen, new)
        weights = np.append(weights, np.zeros(len(new)))
    return chosen, weights


def _outermost(white: Array, variances: Array, indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """The farthest of the points outside, and those at both ends of each axis: several at once save passes."""
    if not len(indices):
        return indices
    ends = [variances.argmax(), *white[1:].argmax(axis=1), *white[1:].argmin(axis=1)]
    return indices[ends]


def _moments(members: Array, weights: Array) -> Array:
    moments: Array = (members * weights) @ members.T
    return moments


def _whitening(members: Array, weights: Array) -> Array:
    return np.linalg.inv(np.linalg.cholesky(_moments(members, weights)))


def _design_of_few(members: Array, weights: Array, tolerance: float) -> Array:
    """Weights (m,) that maximise log det of the moments of members (n, m), from weights with a regular matrix.

    At the optimum every member has the variance n if its weight is positive, and at most n otherwise; the search ends
    when both hold to the tolerance, relative to n.
    """
    n = len(members)
    for _ in range(_STEPS):
        white = _whitening(members, weights) @ members
        variances = np.einsum("ij,ij->j", white, white)
        far, near = int(variances.argmax()), int(np.where(weights > 0, variances, np.inf).argmin())
        above, below = variances[far] / n - 1, 1 - variances[near] / n
        if max(above, below) <= tolerance:
            break
        weights = (_moved(weights, far, above / (variances[far] - 1)) if above >= below
                   else _moved_away(weights, near, below, variances[near]))
        weights = _newton_step(members, weights)
    return weights / weights.sum()


def _moved(weights: Array, member: int, step: float) -> Array:
    moved = weights * (1 - step)
    moved[member] += step
    return moved


def _moved_away(weights: Array, member: int, below: float, variance: float) -> Array:
    """The best step away from a member, or to a weight of zero where that comes first."""
    most = weights[member] / (1 - weights[member])
    if below >= most * (variance - 1):
        moved = weights * (1 + most)
        moved[member] = 0.0
        return moved
    return _moved(weights, member, -below / (variance - 1))


def _newton_step(members: Array, weights: Array) -> Array:
    """Towards the maximum of the quadratic model of log det over weights >= 0, as far as log det grows.

    Frank-Wolfe steps alone need ten thousands where many points lie close to the optimal ellipse. In whitened members y
    the Hessian is -Z' Z with the columns z = y y', and as the first coordinate of every member is 1, which whitening by
    a lower triangle keeps, the gradient of log det minus n times the sum of the weights is Z' (I - n e e'), e the first
    axis: the step is a problem of nonnegative least squares.
    """
    n = len(members)
    white = _whitening(members, weights) @ members
    rows, columns = np.triu_indices(n)
    products = white[rows] * white[columns] * np.where(rows == columns, 1.0, math.sqrt(2))[:, None]
    goal = np.where(rows == columns, 2.0, 0.0)
    goal[0] -= n
    try:
        target = nnls(products, goal)[0]
    except RuntimeError:  # it did not converge: the Frank-Wolfe steps go on without it
        return weights
    if not target.any():
        return weights
    target /= target.sum()
    reached = np.linalg.slogdet(_moments(members, weights))[1]
    for step in (1.0, 0.25, 0.06, 0.015):
        moved = weights + step * (target - weights)
        if np.linalg.slogdet(_moments(members, moved))[1] > reached:
            return moved
    return weights


def _concentrated(cloud: Array, wanted: int) -> NDArray[np.bool_]:
    """(N,), at least ``wanted`` points in a small ellipse."""
    points = _Frame.of(cloud).coordinates
    if not len(points):
        return np.ones(cloud.shape[1], dtype=np.bool_)
    found = [_concentrate_ellipse(points, start, wanted)
             for start in (_concentrate_moments(points, wanted), _nearest(points, *_tight(points), wanted))]
    return max(found, key=lambda kept: float(np.linalg.slogdet(_tight(points[:, kept])[1])[1]))


def _tight(points: Array) -> tuple[Array, Array]:
    return _enclosing(points, _TRIM_TOLERANCE)


def _nearest(points: Array, centre: Array, matrix: Array, wanted: int) -> NDArray[np.bool_]:
    forms = _forms(points - centre[:, None], matrix)
    nearest: NDArray[np.bool_] = forms <= np.partition(forms, wanted - 1)[wanted - 1] * (1 + _TIE)
    return nearest


def _concentrate_moments(points: Array, wanted: int) -> NDArray[np.bool_]:
    kept = np.ones(points.shape[1], dtype=np.bool_)
    for _ in range(_CONCENTRATIONS):
        members = points[:, kept]
        centre = members.mean(axis=1)
        offsets = members - centre[:, None]
        # coordinates of the frame are about one
        matrix = _inverse_of_widened(offsets @ offsets.T / members.shape[1], 1.0)
        before, kept = kept, _nearest(points, centre, matrix, wanted)
        if (before == kept).all():
            break
    return kept


def _concentrate_ellipse(points: Array, kept: NDArray[np.bool_], wanted: int) -> NDArray[np.bool_]:
    for _ in range(_CONCENTRATIONS):
        before, kept = kept, _nearest(points, *_tight(points[:, kept]), wanted)
        if (before == kept).all():
            break
    return kept
