"""Densities against oracles in float64 and torch's own distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from nnunet_cfcl.counterfactual.generator.gaussians import (
    discretised_gaussian_log_probability,
    gaussian_kl,
    gaussian_log_density,
)

WIDTH = 2 / 255
GRID = torch.linspace(-1, 1, 256, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_and_density_are_those_of_torch():
    loc, log_scale, other, other_log = random(4, 50)
    q, p = Normal(loc, log_scale.exp()), Normal(other, other_log.exp())
    torch.testing.assert_close(gaussian_kl(loc, log_scale, other, other_log), kl_divergence(q, p))
    torch.testing.assert_close(gaussian_log_density(other, loc, log_scale), q.log_prob(other))
    assert (gaussian_kl(loc, log_scale, loc, log_scale) == 0).all()
    assert (gaussian_kl(loc, log_scale, other, other_log) > 0).all()


def bins(loc, log_scale):
    return discretised_gaussian_log_probability(
        GRID, torch.full_like(GRID, loc), torch.full_like(GRID, log_scale), WIDTH, -1.0, 1.0)


@pytest.mark.parametrize("loc", [-3.0, -1.0, -0.2, 0.0, 0.3317, 1.0, 2.0])
@pytest.mark.parametrize("log_scale", [-6.0, -4.0, -1.0, 1.0])
def test_the_bins_have_probability_one_together(loc, log_scale):
    assert float(bins(loc, log_scale).exp().sum()) == pytest.approx(1, abs=1e-9)


def test_a_bin_has_the_integral_of_the_density():
    loc, scale, centre = 0.1, 0.05, GRID[140]
    edges = torch.linspace(float(centre) - WIDTH / 2, float(centre) + WIDTH / 2, 2001, dtype=torch.float64)
    integral = torch.trapezoid(Normal(loc, scale).log_prob(edges).exp(), edges)
    assert float(bins(loc, math.log(scale))[140]) == pytest.approx(float(integral.log()), abs=1e-7)


def test_the_picture_turned_over_has_the_same_probabilities():
    torch.testing.assert_close(bins(0.3, -3.0), bins(-0.3, -3.0).flip(0))


def test_a_narrow_bin_is_the_density_times_its_width():
    loc, log_scale = random(2, 50)
    x = random(50, seed=1).clamp(-0.9, 0.9)
    found = discretised_gaussian_log_probability(x, loc, log_scale, 1e-5, -1.0, 1.0)
    torch.testing.assert_close(found, gaussian_log_density(x, loc, log_scale) + math.log(1e-5), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_finite_differences():
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    loc, log_scale = random(2, 5, seed=3).mul(0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda loc, log_scale: discretised_gaussian_log_probability(x, loc, log_scale, 0.5, -1.0, 1.0),
        (loc, log_scale))


@pytest.mark.parametrize("log_scale", [-7.0, -4.6, 0.0, 3.0])
def test_in_float32_value_and_gradient_are_finite_and_point_to_the_value_however_far_the_mean_is(log_scale):
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0])
    for far in (-50.0, -1.5, 0.003, 1.5, 50.0):
        loc = torch.full((4,), far, requires_grad=True)
        scale = torch.full((4,), log_scale, requires_grad=True)
        value = discretised_gaussian_log_probability(x, loc, scale, WIDTH, -1.0, 1.0)
        value.sum().backward()
        assert value.isfinite().all() and loc.grad.isfinite().all() and scale.grad.isfinite().all()
        assert (value <= 1e-6).all()
        # the outer bins are open: outside they have all the probability, and more the farther out
        inner = slice(1, 3)
        assert (loc.grad * (x - far))[inner].min() >= -1e-6
        assert loc.grad[0] <= 1e-6 and loc.grad[-1] >= -1e-6
