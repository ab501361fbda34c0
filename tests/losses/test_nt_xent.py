"""NT-Xent: SimCLR's formula and closed forms."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

from nnunet_cfcl.losses import nt_xent, nt_xent_loss


def test_two_views_give_simclr_s_cross_entropy(assert_same):
    z = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    unit = torch.nn.functional.normalize(z.flatten(0, 1), dim=1)
    logits = (unit @ unit.T / 0.5).masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    partner = torch.arange(10) ^ 1
    assert_same(nt_xent_loss(z).loss, torch.nn.functional.cross_entropy(logits, partner), z)


@pytest.mark.parametrize("views", [2, 4])
def test_equal_embeddings_give_log_of_all_others(views):
    z = torch.ones(3, views, 5).double()
    assert nt_xent_loss(z).loss.item() == pytest.approx(math.log(3 * views - 1), abs=1e-12)


@pytest.mark.parametrize("views", [2, 4])
def test_orthonormal_images_give_the_closed_form(views):
    z = torch.eye(3, dtype=torch.float64)[:, None].repeat(1, views, 1)
    expected = math.log((views - 1) * math.exp(2) + 2 * views) - 2
    assert nt_xent_loss(z).loss.item() == pytest.approx(expected, abs=1e-12)


def test_one_view_has_no_partner_and_costs_nothing():
    z = torch.randn(3, 1, 5, requires_grad=True)
    loss = nt_xent_loss(z).loss
    loss.backward()
    assert loss.item() == 0 and torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(3, 5)}, r"z must be \(B, V, d\), got \(3, 5\)"),
        ({"valid": torch.ones(3, 2)}, r"valid must be bool \(3, 2\), got torch.float32"),
        ({"temperature": 0.0}, "temperature must be finite and at least 0.002, got 0"),
    ],
)
def test_wrong_input_is_a_readable_error(change, message):
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(**{"z": torch.ones(3, 2, 5), **change})


def test_the_documented_example_runs():
    result = doctest.testmod(nt_xent)
    assert result.attempted > 0 and result.failed == 0
