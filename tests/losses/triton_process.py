"""Run by test_triton_dispatch.py under Triton's interpreter, on the CPU: prints a line per check."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from nnunet_cfcl.losses import blockwise, mvd_cl_loss, ranks, triton_dispatch, triton_kernels
from nnunet_cfcl.losses.triton_launch import Launch

TILE = (32, 16, 4, 1)


def both_paths(compute, *inputs: Tensor) -> list[list[Tensor]]:
    """Value and gradients with the kernels and with the blocks."""
    found = []
    for supported in (True, False):
        triton_dispatch._supported = lambda x, supported=supported: supported
        value = compute(*inputs)
        found.append([value, *torch.autograd.grad(value, inputs)])
    return found


def points(n: int, d: int, seed: int) -> Tensor:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.normalize(z, dim=1) * 2).requires_grad_()


def weighted(log_sums: Tensor) -> Tensor:
    return (log_sums * torch.linspace(-1, 2, len(log_sums))).sum()


def two_way(x: Tensor, y: Tensor) -> Tensor:
    return sum(weighted(log_sums) for log_sums in blockwise.two_way_log_sum_exp(x, y, 4.0))


def pool(z: Tensor) -> Tensor:
    return weighted(blockwise.pool_log_sum_exp(z, 4.0))


def check_kernels() -> None:
    for n, m, d in ((1, 1, 5), (32, 16, 5), (37, 21, 5), (20, 70, 33)):
        for ours, blocks in (
            both_paths(two_way, points(n, d, 0), points(m, d, 1)),
            both_paths(pool, points(n + 1, d, 2)),
        ):
            torch.testing.assert_close(ours, blocks, rtol=1e-5, atol=1e-5)
    print("kernels agree")


def check_a_loss() -> None:
    z = points(24, 8, 0).detach().reshape(2, 3, 4, 8).requires_grad_()
    positions = torch.rand(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    ours, blocks = both_paths(lambda z: mvd_cl_loss(z, positions, radius=0.5).loss, z)
    torch.testing.assert_close(ours, blocks, rtol=1e-5, atol=1e-6)
    print("a loss agrees")


def check_shares() -> None:
    """Four processes, one after the other, of which the last has nothing to do: their parts add up."""
    x, y = points(70, 5, 0).detach(), points(21, 5, 1).detach()
    launch = Launch(*TILE, precision="tf32")
    weights = torch.rand(70), torch.rand(21)
    shares = [ranks.Share(rank, 4) for rank in range(4)]
    for compute in (
        lambda share: triton_dispatch.row_sums(x, y, launch, share),
        lambda share: triton_dispatch.gradient(x, y, *weights, launch, share),
        lambda share: triton_dispatch.gradient(x, x, weights[0], weights[0], launch, share, pool=True),
    ):
        parts = [compute(share) for share in shares]
        assert [bool(part.any()) for part in parts] == [True, True, True, False]
        torch.testing.assert_close(sum(parts), compute(ranks.Share()))
    print("shares add up")


def check_the_guard() -> None:
    """A kernel that is wrong, or does not run, is noticed once and not used."""
    for name, wrong in (
        ("differ", lambda x, y, out, launch, share, pool: out.fill_(3)),
        ("RuntimeError: no room", _no_room),
    ):
        right, triton_kernels.write_row_sums = triton_kernels.write_row_sums, wrong
        triton_dispatch._working_launch.cache_clear()
        triton_dispatch._agreed_launch.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours, blocks = both_paths(pool, points(30, 5, 0))
            both_paths(pool, points(40, 5, 0))
        triton_kernels.write_row_sums = right
        assert len(caught) == 1 and name in str(caught[0].message), [str(one.message) for one in caught]
        assert all(torch.equal(a, b) for a, b in zip(ours, blocks))
    print("wrong kernels are not used")


def _no_room(*_: object) -> None:
    raise RuntimeError("no room\nfor it")


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton_dispatch.candidate_tiles = lambda device, precision: [TILE]
    check_kernels()
    check_a_loss()
    check_shares()
    check_the_guard()
