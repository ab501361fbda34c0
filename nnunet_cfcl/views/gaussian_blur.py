"""Separable Gaussian blur with one sigma per image and axis."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# exp(-0.5 / 0.05 ** 2) is 1e-87: below this sigma the sampled Gaussian is a delta even in float32
_SMALLEST_SIGMA = 0.05


def gaussian_blur(images: Tensor, sigma: Tensor, norm: Literal[1, 2] = 1) -> Tensor:
    """Blur every image with a Gaussian, each axis with its own sigma.

    The blur along an axis of length n is the product with an n x n matrix of sampled Gaussians, one per image: no
    truncation, no transfer of sigma to the host, and at patch sizes as fast as a batched matrix product. At the border
    the Gaussian is cut off and normalised again, so a constant image stays constant.

    Args:
        images: (N, C, *S) with D = len(S) spatial axes, any floating-point type.
        sigma: (N, D) standard deviations in voxels of the respective axis, not negative. An image whose sigmas are
            all 0 is returned exactly.
        norm: 1: the weights sum to one, which keeps intensities; 2: their squares do, which keeps the variance of
            white noise at every voxel, border included.

    Returns:
        (N, C, *S), the type and device of ``images``; differentiable with respect to ``images``.

    Raises:
        ValueError: ``sigma`` is not (N, D).
    """
    dim = images.ndim - 2
    if sigma.shape != (images.shape[0], dim):
        raise ValueError(f"sigma must be (N, D) = {(images.shape[0], dim)} for images {tuple(images.shape)}, "
                         f"found {tuple(sigma.shape)}")
    # autocast would run the products in half precision
    with torch.autocast(images.device.type, enabled=False):
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        sigma = sigma.to(wide)
        blurred = wide.movedim(1, -1)
        for axis in range(dim):
            blurred = _blur_leading_axis(blurred, sigma[:, axis], norm)
    untouched = (sigma == 0).all(dim=1).view(-1, *[1] * (dim + 1))
    return torch.where(untouched, images, blurred.to(images.dtype))


def _blur_leading_axis(x: Tensor, sigma: Tensor, norm: Literal[1, 2]) -> Tensor:
    """Blur (N, n, *rest) to (N, *rest, n): the blurred axis moves to the end, which saves a copy per axis."""
    matrix = gaussian_matrix(sigma, x.shape[1], norm)
    flat = torch.bmm(x.flatten(2).transpose(1, 2), matrix.transpose(1, 2))
    return flat.view(x.shape[0], *x.shape[2:], x.shape[1])


def gaussian_matrix(sigma: Tensor, length: int, norm: Literal[1, 2] = 1) -> Tensor:
    """Build matrices (N, length, length) whose row i is a Gaussian around i, normalised in ``norm``.

    Args:
        sigma: (N,) standard deviations in voxels; 0 gives the identity.
        length: number of voxels along the axis.
        norm: norm of the rows that is one, 1 or 2.
    """
    position = torch.arange(length, device=sigma.device, dtype=sigma.dtype)
    distance = position[:, None] - position[None, :]
    weights = torch.exp(-0.5 * (distance / sigma.clamp_min(_SMALLEST_SIGMA).view(-1, 1, 1)) ** 2)
    return weights / torch.linalg.vector_norm(weights, ord=norm, dim=2, keepdim=True)
