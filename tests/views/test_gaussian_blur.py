"""The shared Gaussian blur against scipy, closed forms and symmetries."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_cfcl.views.gaussian_blur import gaussian_blur, gaussian_matrix


def scipy_blur(image: np.ndarray, sigma: list[float]) -> np.ndarray:
    """Edge-normalised blur: the blurred image divided by the blurred image of ones."""
    blur = lambda a: gaussian_filter(a, sigma, mode="constant", truncate=12)  # noqa: E731
    return blur(image) / blur(np.ones_like(image))


@pytest.mark.parametrize("shape", [(9, 14), (6, 11, 8)])
def test_every_image_and_axis_is_blurred_as_scipy_does_with_its_own_sigma(shape):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, *shape, generator=generator, dtype=torch.float64)
    sigma = 0.3 + 2 * torch.rand(3, len(shape), generator=generator, dtype=torch.float64)
    blurred = gaussian_blur(images, sigma)
    for n in range(3):
        for c in range(2):
            expected = scipy_blur(images[n, c].numpy(), sigma[n].tolist())
            np.testing.assert_allclose(blurred[n, c].numpy(), expected, atol=1e-10)


def test_zero_sigma_returns_exactly_the_same_numbers_even_beside_blurred_images():
    images = torch.randn(2, 1, 7, 9)
    blurred = gaussian_blur(images, torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert torch.equal(blurred[0], images[0])
    assert not torch.allclose(blurred[1], images[1])


def test_zero_sigma_along_one_axis_leaves_that_axis_alone():
    images = torch.randn(1, 1, 7, 9, dtype=torch.float64)
    rows = gaussian_blur(images, torch.tensor([[0.0, 1.5]]))
    one_row = gaussian_blur(images[:, :, 3:4], torch.tensor([[0.0, 1.5]]))
    torch.testing.assert_close(rows[:, :, 3:4], one_row)


def test_a_constant_image_stays_constant_up_to_the_border():
    blurred = gaussian_blur(torch.full((1, 1, 5, 6, 7), -3.5), torch.tensor([[2.0, 0.7, 30.0]]))
    torch.testing.assert_close(blurred, torch.full((1, 1, 5, 6, 7), -3.5))


def test_an_impulse_becomes_the_normalised_gaussian():
    impulse = torch.zeros(1, 1, 41, dtype=torch.float64)
    impulse[..., 20] = 1
    blurred = gaussian_blur(impulse, torch.tensor([[2.0]]))[0, 0]
    offsets = torch.arange(-4, 5, dtype=torch.float64)
    expected = torch.exp(-(offsets**2) / 8) / (2 * torch.pi * 4) ** 0.5
    torch.testing.assert_close(blurred[16:25], expected, atol=1e-6, rtol=0)


def test_a_batch_equals_its_images_one_by_one():
    images, sigma = torch.randn(4, 2, 8, 5, 6), 2 * torch.rand(4, 3)
    one_by_one = torch.cat([gaussian_blur(images[i : i + 1], sigma[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(gaussian_blur(images, sigma), one_by_one)


def test_blurring_commutes_with_flipping_and_swapping_axes():
    images, sigma = torch.randn(1, 1, 6, 9, dtype=torch.float64), torch.tensor([[0.8, 1.7]], dtype=torch.float64)
    blurred = gaussian_blur(images, sigma)
    torch.testing.assert_close(gaussian_blur(images.flip(2), sigma), blurred.flip(2))
    torch.testing.assert_close(gaussian_blur(images.mT, sigma.flip(1)), blurred.mT)


def test_the_second_norm_keeps_the_variance_of_white_noise_at_every_voxel():
    noise = torch.randn(4000, 1, 6, 5, generator=torch.Generator().manual_seed(1))
    blurred = gaussian_blur(noise, torch.tensor([[1.5, 0.8]]).expand(4000, 2), norm=2)
    torch.testing.assert_close(blurred.std(dim=0), torch.ones(1, 6, 5), atol=0.06, rtol=0)
    rows = gaussian_matrix(torch.tensor([0.0, 1.0, 9.0]), 12, norm=2)
    torch.testing.assert_close(rows.square().sum(2), torch.ones(3, 12))


def test_half_precision_and_autocast_do_not_lose_precision_on_the_way():
    images, sigma = torch.randn(1, 1, 20, 20), torch.tensor([[1.0, 2.0]])
    expected = gaussian_blur(images, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_blur(images, sigma), expected)
    half = gaussian_blur(images.half(), sigma)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, atol=2e-3, rtol=0)


def test_the_gradient_is_that_of_finite_differences():
    images = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([[0.5, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gaussian_blur(x, sigma), (images,))


def test_a_sigma_of_the_wrong_shape_is_rejected():
    with pytest.raises(ValueError, match="sigma must be"):
        gaussian_blur(torch.zeros(2, 1, 4, 4), torch.ones(2, 3))
