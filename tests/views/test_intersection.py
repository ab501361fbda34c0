"""The box around the intersection of oriented boxes."""

from __future__ import annotations

import math

import torch

from nnunet_cfcl.views.intersection import bounding_frame


def rotated(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def frame_of(frames, low, high):
    return bounding_frame(torch.stack(frames), *(torch.tensor(bounds, dtype=torch.float64) for bounds in (low, high)))


def test_parallel_boxes_meet_in_a_box():
    eye = torch.eye(3, dtype=torch.float64)
    matrix, empty = frame_of([eye, eye], [[0, 0, 0], [1, -1, 2]], [[4, 4, 4], [9, 3, 3]])
    assert not bool(empty)
    torch.testing.assert_close(matrix[:, 3], torch.tensor([1.0, 0, 2], dtype=torch.float64))
    torch.testing.assert_close(matrix[:, :3], torch.tensor([3.0, 3, 1], dtype=torch.float64).diag())


def test_a_box_inside_a_rotated_one_is_its_own_frame():
    matrix, _ = frame_of([rotated(0.5), rotated(0.0)], [[-10, -10], [-1, -2]], [[10, 10], [3, 2]])
    torch.testing.assert_close(matrix[:, :2].det(), torch.tensor(16.0, dtype=torch.float64))


def test_a_corner_cut_off_by_a_turned_box_is_bounded_tightly():
    half = math.sqrt(2)  # the turned square is |x| + |y| <= 2; the other one holds its tip x >= 1
    matrix, empty = frame_of([rotated(math.pi / 4), rotated(0.0)], [[-half, -half], [1, -5]], [[half, half], [9, 5]])
    # the tip is a triangle of area 1; no parallel box around it is smaller than twice that
    assert not bool(empty)
    torch.testing.assert_close(matrix[:, :2].det().abs(), torch.tensor(2.0, dtype=torch.float64))


def test_boxes_that_do_not_meet_are_reported():
    matrix, empty = frame_of([rotated(0.3), rotated(0.0)], [[-1, -1], [3, -1]], [[1, 1], [5, 1]])
    assert bool(empty) and bool((matrix == 0).all())


def test_many_intersections_are_found_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn(5, 3, 3, 3, generator=generator, dtype=torch.float64)).Q
    high = 1 + torch.rand(5, 3, 3, generator=generator, dtype=torch.float64)
    together = bounding_frame(frames, -high, high)[0]
    for i in range(5):
        torch.testing.assert_close(bounding_frame(frames[i], -high[i], high[i])[0], together[i])
        points = 4 * torch.rand(20000, 3, generator=generator, dtype=torch.float64) - 2
        inside = ((points @ frames[i].mT).abs() <= high[i][:, None]).all(-1).all(0)
        unit = torch.linalg.solve(together[i, :, :3], (points[inside] - together[i, :, 3]).T).T
        # all of the intersection lies in the frame, and reaches every side of it
        assert bool((unit >= -1e-9).all()) and bool((unit <= 1 + 1e-9).all())
        assert float(unit.amin(0).max()) < 0.2 and float(unit.amax(0).min()) > 0.8
