"""Pair rules against masks of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunet_cfcl.losses import pair_rules
from nnunet_cfcl.losses.pair_rules import Neighbours, PairRule, SameClass, SamePoint

SIZES = [3, 0, 5, 4]


def _neighbours() -> tuple[Neighbours, Tensor]:
    positions = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    image = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
    near = (positions[:, None] - positions[None]).norm(dim=-1) < 0.6
    mask = near & (image[:, None] == image[None]) & ~torch.eye(12, dtype=torch.bool)
    return Neighbours(positions, SIZES, 0.6), mask


def _same_class(pool: bool) -> tuple[SameClass, Tensor]:
    g = torch.Generator().manual_seed(1)
    anchors, candidates = torch.randint(3, 7, (12,), generator=g), torch.randint(4, 9, (10,), generator=g)
    if pool:
        return SameClass(anchors), (anchors[:, None] == anchors) & ~torch.eye(12, dtype=torch.bool)
    return SameClass(anchors, candidates), anchors[:, None] == candidates


RULES = {
    "same point": lambda: (SamePoint(torch.device("cpu")), torch.eye(12, dtype=torch.bool)),
    "neighbours": _neighbours,
    "same class": lambda: _same_class(pool=False),
    "same class in a pool": lambda: _same_class(pool=True),
}


@pytest.fixture(params=RULES)
def rule_and_mask(request) -> tuple[PairRule, Tensor]:
    return RULES[request.param]()


@pytest.mark.parametrize("pairs", [1, 7, 2**22])
def test_sums_over_positives_and_their_gradient_equal_the_mask_of_all_pairs(rule_and_mask, monkeypatch, pairs):
    monkeypatch.setattr(pair_rules, "_STRIP_PAIRS", pairs)
    rule, mask = rule_and_mask
    values = torch.randn(mask.shape[1], 3, dtype=torch.float64, requires_grad=True)
    sums = rule.sum_over_positives(values)
    expected = mask.double() @ values
    torch.testing.assert_close(sums, expected)
    direction = torch.randn_like(sums)
    torch.testing.assert_close(
        torch.autograd.grad(sums, values, direction), torch.autograd.grad(expected, values, direction))


def test_a_block_is_that_part_of_the_mask_and_none_where_it_is_empty(rule_and_mask):
    rule, mask = rule_and_mask
    own = torch.eye(*mask.shape, dtype=torch.bool)
    for top in range(0, 12, 3):
        for left in range(0, mask.shape[1], 2):
            rows, columns = slice(top, top + 3), slice(left, min(left + 2, mask.shape[1]))
            block, part = rule.block(rows, columns), mask[rows, columns]
            if isinstance(rule, SameClass) and mask.shape == (12, 12):
                part = part | own[rows, columns]
            assert not part.any() if block is None else torch.equal(block, part)


def test_blocks_of_different_images_or_points_are_none():
    rule, _ = _neighbours()
    assert rule.block(slice(0, 3), slice(3, 12)) is None
    for rows, columns in ((slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 4))):
        assert SamePoint(torch.device("cpu")).block(rows, columns) is None


def test_a_point_at_the_radius_is_no_neighbour_and_one_at_the_same_place_is():
    rule = Neighbours(torch.tensor([[0.0], [0.25], [0.0], [0.5]], dtype=torch.float16), [4], 0.25)
    assert rule.sum_over_positives(torch.ones(4, 1)).flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_strips_cover_every_pair_of_an_image_once(processes):
    rule, _ = _neighbours()
    seen = torch.zeros(12, 12, dtype=torch.int64)
    for rows, image in rule.strips(processes):
        seen[rows, image] += 1
    image = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
    assert torch.equal(seen, (image[:, None] == image[None]).long())


@pytest.mark.parametrize(("pairs", "heights"), [(2**22, {5}), (10, {2, 1}), (3, {1})])
def test_strips_hold_a_bounded_number_of_pairs(monkeypatch, pairs, heights):
    monkeypatch.setattr(pair_rules, "_STRIP_PAIRS", pairs)
    rule = Neighbours(torch.zeros(5, 2), [5], 0.6)
    assert {rows.stop - rows.start for rows, _ in rule.strips(1)} == heights


def test_the_mean_of_a_class_survives_an_own_weight_that_dominates_its_sum():
    weights = torch.tensor([[1.0], [1e-6], [1e-6]])
    assert SameClass(torch.zeros(3).long()).sum_over_positives(weights)[0].item() == pytest.approx(2e-6, rel=1e-6)
