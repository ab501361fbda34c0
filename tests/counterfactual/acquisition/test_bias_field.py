"""The bias field against explicit Bernstein polynomials, and its properties."""

import pytest
import torch

from nnunet_cfcl.counterfactual.acquisition.bias_field import draw_log_bias_field, log_bias_field


def draw(dim, count=20, amplitude=(0.3, 0.3), on=None):
    generator = torch.Generator().manual_seed(4)
    return draw_log_bias_field(generator, torch.ones(count) if on is None else on, amplitude, dim)


def test_the_field_is_the_tensor_product_of_cubic_bernstein_polynomials():
    control = torch.randn(1, 4, 4, dtype=torch.float64)
    field = log_bias_field(control, (5, 7))[0]
    bernstein = lambda t: [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]  # noqa: E731
    for i in range(5):
        for j in range(7):
            rows, columns = bernstein((i + 0.5) / 5), bernstein((j + 0.5) / 7)
            expected = sum(control[0, a, b] * rows[a] * columns[b] for a in range(4) for b in range(4))
            assert field[i, j].item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("dim", "shape"), [(2, (16, 20)), (3, (16, 18, 17))])
def test_the_log_field_has_mean_zero_and_the_given_amplitude(dim, shape):
    field = log_bias_field(draw(dim), shape).flatten(1)
    torch.testing.assert_close(field.mean(1), torch.zeros(20), atol=2e-3, rtol=0)
    torch.testing.assert_close(field.abs().amax(1), torch.full((20,), 0.3), atol=0.04, rtol=0)


def test_the_field_is_smooth_between_neighbouring_voxels():
    field = log_bias_field(draw(3), (64, 64, 64))
    steps = torch.stack([field.diff(dim=axis).abs().max() for axis in (1, 2, 3)])
    # a polynomial of degree n on [0, 1] bounded by A has a slope of at most 2 n^2 A (Markov)
    assert steps.max() < 2 * 9 * 0.35 / 64


def test_a_switched_off_field_is_exactly_zero():
    control = draw(2, count=2, on=torch.tensor([1.0, 0.0]))
    assert (control[1] == 0).all()
    assert (log_bias_field(control, (9, 9))[1] == 0).all()
    assert control[0].abs().max() > 0
