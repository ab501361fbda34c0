"""Processes that share the blocks of a loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nnunet_cfcl.losses import mvd_cl_loss, share_blocks
from nnunet_cfcl.losses.blockwise import _side, rectangle_blocks, triangle_blocks
from nnunet_cfcl.losses.ranks import Share, current_share

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[dict[str, list[torch.Tensor]]]:
    """What one process alone and each of two processes together computed."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("share_blocks_process.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(count), str(folder)], env=environment)
        for rank, count in ((0, 0), (0, 2), (1, 2))
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / name) for name in ("0_0.pt", "2_0.pt", "2_1.pt")]


def test_two_processes_have_the_value_and_the_gradients_of_one(shared):
    alone, *together = shared
    assert len(alone) == 30
    for one in together:
        assert one.keys() == alone.keys()
        for key, expected in alone.items():
            torch.testing.assert_close(one[key], expected, rtol=0, atol=1e-10, msg=key)


def test_two_processes_agree_to_the_last_bit(shared):
    for key, expected in shared[1].items():
        assert all(torch.equal(a, b) for a, b in zip(shared[2][key], expected)), key


@pytest.mark.parametrize("processes", [2, 3, 8, 16])
@pytest.mark.parametrize("points", [100, 1000, 8000, 32_000])
def test_no_process_has_much_more_work_than_its_share(points, processes):
    for blocks, pairs in (
        (rectangle_blocks(points, points, _side(points**2, processes)), points**2),
        (triangle_blocks(points, _side(points**2 // 2, processes)), points**2 / 2),
    ):
        work = [
            sum((i.stop - i.start) * (j.stop - j.start) for i, j in Share(rank, processes).mine(blocks))
            for rank in range(processes)
        ]
        assert max(work) < 1.35 * pairs / processes, (points, processes)


def test_without_a_context_the_work_is_all_ours_and_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)
    assert current_share() == Share(0, 1, None)
    mvd_cl_loss(torch.ones(1, 2, 3, 4, requires_grad=True), torch.zeros(1, 2, 3, 2)).loss.backward()


def test_a_context_without_torch_distributed_is_a_readable_error():
    with pytest.raises(ValueError, match="needs torch.distributed to be initialised"), share_blocks():
        pass
