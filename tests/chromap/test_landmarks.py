"""The extension against loops in float64, and what must not change it."""

import math

import pytest
import torch

from nnunet_cfcl.chromap import landmarks as module
from nnunet_cfcl.chromap.landmarks import choose_landmarks, extend


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(points, landmarks, positions, neighbours, reach):
    """Point by point, as the docstring says it."""
    marks, spots, places = landmarks.tolist(), positions.tolist(), []
    for point in points.tolist():
        distances = [math.dist(point, mark) for mark in marks]
        near = sorted(range(len(marks)), key=distances.__getitem__)[:neighbours]
        last, total, across, up = distances[near[-1]], 0.0, 0.0, 0.0
        for i in near:
            if math.dist(spots[i], spots[near[0]]) <= reach:
                weight = (1 / distances[i] - 1 / last) ** 2
                total, across, up = total + weight, across + weight * spots[i][0], up + weight * spots[i][1]
        places.append([across / total, up / total])
    return torch.tensor(places)


@pytest.mark.parametrize("count", [7, 64, 255, 300, 1000])
@pytest.mark.parametrize("neighbours", [3, 4, 5])
def test_places_are_those_of_a_loop(count, neighbours):
    points, landmarks, positions = random(40, 8, seed=1), random(count, 8, seed=2), 0.3 * random(count, 2, seed=3)
    found = extend(points, landmarks, positions, neighbours, reach=0.4)
    expected = slow(points, landmarks, positions, neighbours, 0.4)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("count", [3, 50, 1000])
def test_a_point_on_a_landmark_gets_its_place(count):
    landmarks, positions = random(count, 8) + 30, random(count, 2, seed=1)
    torch.testing.assert_close(extend(landmarks, landmarks, positions, reach=9.0), positions, atol=1e-6, rtol=0)
    twice = extend(landmarks.repeat(2, 1), landmarks.repeat(8, 1), positions.repeat(8, 1), reach=9.0)
    torch.testing.assert_close(twice, positions.repeat(2, 1), atol=1e-5, rtol=0)


def test_neither_the_order_of_landmarks_nor_where_zero_is_nor_a_turn_changes_places():
    points, landmarks, positions = random(200, 8), random(1000, 8, seed=1), random(1000, 2, seed=2)
    expected = extend(points, landmarks, positions)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(extend(points, landmarks[order], positions[order]), expected, atol=1e-5, rtol=0)
    moved = extend(points + 50, landmarks + 50, positions)
    torch.testing.assert_close(moved, expected, atol=2e-3, rtol=0)
    turn = torch.linalg.qr(random(8, 8, seed=4)).Q
    torch.testing.assert_close(extend(points @ turn, landmarks @ turn, positions), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(extend(points, landmarks, positions + 3), expected + 3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_bytes", [1, 30_000, 10**9])
def test_blocks_do_not_change_places(block_bytes):
    points, landmarks, positions = random(333, 8), random(500, 8, seed=1), random(500, 2, seed=2)
    expected = extend(points, landmarks, positions)
    found = extend(points, landmarks, positions, block_bytes=block_bytes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_half_precision_and_transposed_points_are_taken_as_they_are():
    points, landmarks, positions = random(100, 8).half(), random(500, 8, seed=1), random(500, 2, seed=2)
    expected = extend(points.float(), landmarks, positions)
    found = extend(points.T.contiguous().T, landmarks.half().float(), positions)
    assert found.dtype == torch.float32 and found.shape == (100, 2)
    assert torch.equal(extend(points, landmarks, positions), expected)


def test_a_place_never_lies_between_parts_that_were_torn_apart():
    landmarks = torch.linspace(-1, 1, 400)[:, None]
    positions = torch.cat([torch.where(landmarks < 0, -0.8, 0.8), 0.1 * landmarks], 1)
    across = extend(torch.linspace(-0.02, 0.02, 301)[:, None], landmarks, positions)[:, 0]
    assert (across.abs() - 0.8).abs().max() < 1e-6 and across.unique().numel() > 1
    torn = extend(torch.linspace(-0.02, 0.02, 301)[:, None], landmarks, positions, reach=9.0)[:, 0]
    assert torn.abs().min() < 0.3


def test_places_change_steadily_where_nothing_was_torn():
    landmarks = random(600, 3)
    positions = 0.1 * landmarks[:, :2]
    way = torch.linspace(-1, 1, 20_001)[:, None] * torch.tensor([[1.0, 0.5, -0.3]])
    steps = extend(way, landmarks, positions, reach=9.0).diff(dim=0)
    assert torch.linalg.vector_norm(steps, dim=1).max() < 2e-3


@pytest.mark.parametrize("neighbours", [1, 2, 4])
def test_places_are_finite_and_within_the_landmarks_whatever_the_points_are(neighbours):
    landmarks, positions = random(500, 8), random(500, 2, seed=1)
    points = random(8, 8, seed=2)
    points[0, 0], points[1, 1], points[2, 2], points[3] = math.nan, math.inf, -math.inf, math.nan
    points[4], points[5], points[6] = 3e38, 1e-30, -65504
    found = extend(points, landmarks, positions, neighbours)
    assert found.isfinite().all()
    assert (found >= positions.amin(0) - 1e-5).all() and (found <= positions.amax(0) + 1e-5).all()
    alike = extend(torch.ones(3, 8), torch.ones(5, 8), positions[:1].expand(5, 2), neighbours)
    torch.testing.assert_close(alike, positions[:1].expand(3, 2))
    between = extend(torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0, 0.0], [0.2, 0.0]]))
    torch.testing.assert_close(between, torch.tensor([[0.1, 0.0]]))
    assert extend(torch.empty(0, 8), landmarks, positions, neighbours).shape == (0, 2)


def test_landmarks_are_different_points_and_the_same_for_a_seed():
    cloud = random(3000, 8)
    first, again, other = (choose_landmarks(cloud, 200, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == len(first) == 200
    moved = choose_landmarks(cloud.half() + 100, 200, 0)
    assert len(moved) == 200


def test_landmarks_come_nearer_to_rare_parts_than_points_drawn_at_random():
    rare = random(200, 8, seed=1) + 3
    cloud = torch.cat([0.2 * random(20_000, 8), rare])
    chosen = cloud[choose_landmarks(cloud, 300)]
    at_random = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(0))[:300]]
    assert torch.cdist(rare, chosen).amin(1).mean() < 0.6 * torch.cdist(rare, at_random).amin(1).mean()
    assert torch.cdist(cloud, chosen).amin(1).max() < 0.8 * torch.cdist(cloud, at_random).amin(1).max()
    assert (torch.cdist(chosen, rare).amin(1) > 0.5).sum() > 100


def test_where_points_repeat_each_is_chosen_once():
    cloud = random(12, 4).repeat(50, 1) + 40
    chosen = choose_landmarks(cloud, 100)
    assert len(chosen) == 12 and len(cloud[chosen].unique(dim=0)) == 12
    assert choose_landmarks(torch.ones(20, 3), 5).shape == (1,)
    assert sorted(choose_landmarks(random(9, 4), 50).tolist()) == list(range(9))


def test_of_a_huge_cloud_a_part_is_looked_at(monkeypatch):
    monkeypatch.setattr(module, "CLOUD", 100)
    chosen = choose_landmarks(random(5000, 4), 90)
    assert len(chosen.unique()) == 90 and chosen.max() > 1000


def test_no_points_and_no_landmarks_wanted_are_told():
    for features, count in ((torch.empty(0, 3), 5), (torch.zeros(3), 5), (torch.zeros(5, 3), 0)):
        with pytest.raises(ValueError, match="expected features"):
            choose_landmarks(features, count)
