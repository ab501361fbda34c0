"""One of the processes of test_ranks.py: every objective on the same problem, values and gradients to a file.

    python share_blocks_process.py RANK COUNT FOLDER       COUNT 0: alone, without torch.distributed
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nnunet_cfcl.losses import share_blocks
from nnunet_cfcl.losses.ranks import current_share
from tests.losses.conftest import OBJECTIVES, Problem

OPTIONS = {
    "dvd": [{}, {"hard_negatives": 2.0}, {"ignore_radius": 0.4}],
    "mvd": [{}, {"hard_negatives": 2.0}],
    "s_dvd": [{}, {"hard_negatives": 2.0}],
    "s_mvd": [{}, {"hard_negatives": 2.0}],
    "nt_xent": [{}],
}


def results(count: int) -> dict[str, list[torch.Tensor]]:
    """Per objective, options and size of the problem: value and gradients of embeddings and temperature."""
    found = {}
    for points in (1, 4, 40):
        problem = Problem.draw(seed=points, points=points)
        for name, choices in OPTIONS.items():
            for options in choices:
                z = problem.z.detach().clone().requires_grad_()
                temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
                with share_blocks() if count else nullcontext():
                    loss = OBJECTIVES[name].loss(replace(problem, z=z), temperature=temperature, **options)
                gradients = torch.autograd.grad(loss, (z, temperature))
                found[f"{name} {options} {points}"] = [loss.detach(), *gradients]
    return found


def main() -> None:
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if count:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=count)
        with share_blocks():
            share = current_share()
            assert share.all_have(7, torch.device("cpu")) and not share.all_have(rank, torch.device("cpu"))
    torch.save(results(count), folder / f"{count}_{rank}.pt")
    if count:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
