"""Bounds and symmetries of every objective, for random problems of any size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_cfcl.losses import blockwise, pool_log_sum_exp

seeds = st.integers(0, 10_000)
temperatures = st.floats(math.log(0.01), math.log(10.0)).map(math.exp)
some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def directions(objective) -> int:
    """Losses between two views are added up for both directions."""
    return 2 if "dvd" in objective.name else 1


@some
@given(seed=seeds, batch=st.integers(1, 4), points=st.integers(1, 6), temperature=temperatures,
       beta=st.sampled_from([0.0, 3.0]))
def test_no_loss_is_negative_and_none_exceeds_what_all_candidates_at_the_far_side_would_cost(
    point_objective, draw_problem, seed, batch, points, temperature, beta
):
    """The positives are among the candidates: log sum exp over all is at least their mean, and at most the log of the
    number of candidates above the largest logit, 1 / temperature, while a mean of logits is at least its opposite."""
    problem = draw_problem(seed, batch, 2, points)
    value = point_objective.loss(problem, temperature=temperature, hard_negatives=beta).item()
    worst = math.log(2 * batch * points) + 2 / temperature
    assert -1e-9 <= value <= directions(point_objective) * worst + 1e-9


@some
@given(seed=seeds, batch=st.integers(2, 5), temperature=temperatures)
def test_nt_xent_lies_between_its_bounds(objectives, draw_problem, seed, batch, temperature):
    value = objectives["nt_xent"].loss(draw_problem(seed, batch, 3, 1, masked=False), temperature=temperature).item()
    # two positives that agree cost log 2 at least
    assert math.log(2) - 1e-9 <= value <= math.log(3 * batch) + 2 / temperature


@some
@given(seed=seeds, temperature=temperatures)
def test_turning_the_space_of_embeddings_turns_the_gradients_alone(objective, draw_problem, seed, temperature):
    problem = draw_problem(seed)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()).Q
    turned = replace(problem, z=(problem.z.detach() @ rotation).requires_grad_())
    loss, other = (objective.loss(one, temperature=temperature) for one in (problem, turned))
    torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9)
    (gradient,), (found,) = torch.autograd.grad(loss, problem.z), torch.autograd.grad(other, turned.z)
    torch.testing.assert_close(found, gradient @ rotation, rtol=1e-6, atol=1e-9)


@some
@given(seed=seeds, batch=st.integers(1, 3), points=st.integers(1, 5))
def test_gradients_are_orthogonal_to_the_embeddings_and_zero_where_nothing_is_valid(
    objective, draw_problem, seed, batch, points
):
    """The length of an embedding does not matter, so that nothing pulls along it."""
    problem = draw_problem(seed, batch, 2, points)
    (gradient,) = torch.autograd.grad(objective.loss(problem), problem.z)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close((gradient * problem.z).sum(-1), torch.zeros(batch, 2, points).double())
    if "dvd" not in objective.name:
        assert not gradient[~problem.valid].any()


@some
@given(seed=seeds, batch=st.integers(1, 3), views=st.integers(2, 4), side=st.integers(1, 30))
def test_gradients_equal_finite_differences_in_a_random_direction(objective, draw_problem, seed, batch, views, side):
    problem = draw_problem(seed, batch, views, 4)
    direction = torch.randn(problem.z.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_BLOCK_SIDE", side)
        (gradient,) = torch.autograd.grad(objective.loss(problem), problem.z)
        ahead, behind = (
            objective.loss(replace(problem, z=problem.z.detach() + step * direction)) for step in (1e-5, -1e-5))
    slope = ((ahead - behind) / 2e-5).item()
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@some
@given(points=st.integers(1, 25), side=st.integers(1, 30), temperature=temperatures, seed=seeds)
def test_a_pool_in_blocks_of_any_side_equals_the_dense_formula(points, side, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(points, 5, generator=generator).double(), dim=1)
    z = (unit / math.sqrt(temperature)).requires_grad_()
    weights = torch.rand(points, generator=generator).double()
    dense = (z @ z.T).fill_diagonal_(-torch.inf).logsumexp(1)
    found = pool_log_sum_exp(z, 1 / temperature, side)
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-9)
    if points > 1:
        ours, theirs = (torch.autograd.grad((weights * value).sum(), z)[0] for value in (found, dense))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
