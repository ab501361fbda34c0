"""``torchrun ... -m nnunet_cfcl.pretrain DATASET CONFIG FOLD -tr NAME``: phase 1 alone, on any number of processes.

Every process is one rank of torch.distributed; the images of a step are split between them, the result is that of one
process (up to rounding). ``nnUNetv2_train`` with the same trainer then finds phase 1 done.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from nnunet_cfcl.errors import UserError

# how long a rank may be late, say with a case from a slow disk, and how long a lost host holds up the others
TIMEOUT = timedelta(minutes=10)


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain; run by torchrun in every process, or alone in one.

    Returns:
        The exit status: 0 done, 1 an error that the user can fix.
    """
    arguments = _parser().parse_args(argv)
    store = None
    try:
        device = own_device(arguments.device)
        store = _join_others(device) if "RANK" in os.environ else None
        _pretrain(arguments, device)
    except UserError as error:
        if _first_to_say(str(error), store):
            print(f"nnunet_cfcl.pretrain: {error}", file=sys.stderr, flush=True)
        return 1  # the others may wait for this rank: it must not wait for them in turn
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_cfcl.pretrain",
        description="Phase 1 of a trainer alone, in one process or, started by torchrun, in many. A run that was "
                    "killed resumes after its last finished epoch. nnUNetv2_train with the same trainer then does "
                    "phase 2.")
    parser.add_argument("dataset", metavar="DATASET", help="number or name of the dataset")
    parser.add_argument("configuration", metavar="CONFIG", help="2d, 3d_fullres, ...")
    parser.add_argument("fold", metavar="FOLD", help="0 to 4, or all")
    parser.add_argument("-tr", default="nnUNetTrainerDVDCL", metavar="TRAINER", help="default: %(default)s")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    return parser


def own_device(kind: str) -> torch.device:
    """This process's own.

    Raises:
        UserError: it has no GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    number, known = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= known:
        raise UserError(
            f"process {number} of this host finds {known} CUDA GPUs, expected one per process",
            "start at most as many processes as GPUs (torchrun --nproc_per_node), or use -device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _join_others(device: torch.device) -> dist.Store:
    """Become a rank of torch.distributed, as torchrun's environment variables say."""
    shared, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = _fresh_part(shared, rank, count)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    return store


def _fresh_part(store: dist.Store, rank: int, count: int) -> dist.Store:
    """A part of the store that no earlier start of these ranks has used; the same on all of them.

    torchrun keeps one store over its restarts, where the addresses of the lost processes would be taken for those of
    the new ones. Its count of restarts tells the starts apart on one host only (pytorch issues 135712 and 108158).
    Here the first rank names the part, and answers questions that only ranks of this start can ask.

    Raises:
        RuntimeError: not all ranks came within `TIMEOUT`.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question {rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.add(f"joined {name}", 1)
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while store.add(f"joined {name}", 0) < count - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {store.add(f'joined {name}', 0) + 1} of {count} processes came in {TIMEOUT}")
        for key in (f"question {other}" for other in range(1, count)):
            if store.check([key]):
                store.set(f"answer to {store.get(key).decode()}", name)
        time.sleep(0.1)
    return dist.PrefixStore(name, store)


def _first_to_say(message: str, store: dist.Store | None) -> bool:
    """Whether no other rank has said this: most mistakes are found by all of them."""
    try:
        return store is None or store.add(message, 1) == 1
    except RuntimeError:  # the rank that keeps the store is gone
        return True


@record  # tells torchrun which rank was the first to fail, and why
def _pretrain(arguments: argparse.Namespace, device: torch.device) -> None:
    from nnunet_cfcl.nnunet.fold import FoldContext
    from nnunet_cfcl.phases.pretraining_phase import PretrainingPhase
    from nnunet_cfcl.runs.ranks import Ranks
    from nnunet_cfcl.trainers.lookup import find_trainer

    ranks = Ranks.current()
    log = _print if ranks.is_main else _silent
    trainer_class = find_trainer(arguments.tr)
    fold = FoldContext.find(
        trainer_class, arguments.dataset, arguments.configuration, arguments.fold, arguments.p, device, log)
    if not fold.settings.pretrain.enabled:
        raise UserError("pretrain.enabled is false, so there is no pretraining to run",
                        "set it to true, or start nnUNetv2_train directly")
    folder = PretrainingPhase(fold, trainer_class.method, None, ranks).run(fold.build_network())
    cpu = " -device cpu" if device.type == "cpu" else ""
    log(f"Phase 1 done, its files are in {folder}. Phase 2: nnUNetv2_train {arguments.dataset} "
        f"{arguments.configuration} {arguments.fold} -tr {arguments.tr} -p {arguments.p}{cpu}")


def _print(*line: Any, **ignored: Any) -> None:
    print(*line, flush=True)


def _silent(*line: Any, **ignored: Any) -> None:
    """The other ranks say nothing."""


if __name__ == "__main__":
    sys.exit(main())
