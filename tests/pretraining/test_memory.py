"""A long pretraining needs no more memory than a short one, worker processes included."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from nnunet_cfcl.pretraining import loop
from nnunet_cfcl.pretraining.loop import Pretraining
from nnunet_cfcl.views import ViewGeometry
from tests.pretraining.every_method import make_task, pretraining_of
from tests.pretraining.unusual_inputs import UnusualInput

#: Per 1000 steps. What a step holds is several times as much, so that keeping a hundredth of it would be noticed.
MOST_MIB = 2.0
WARM_UP = 0.3


def resident_mib(process: int) -> float:
    """What a process holds in memory."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return float(lines["VmRSS"].split()[0]) / 1024


def children() -> list[int]:
    """Processes begun by this one: those that load the data."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


class Memory:
    """Looks at the memory after every epoch; ``track`` of a task."""

    def __init__(self) -> None:
        self.others = set(children())  # of tests before this one
        self.own: list[float] = []
        self.workers: list[list[float]] = []

    def __call__(self, line: Mapping[str, float]) -> None:
        self.own.append(resident_mib(os.getpid()))
        self.workers.append([resident_mib(child) for child in sorted(set(children()) - self.others)])

    @staticmethod
    def growth(measured: list[float], steps: int) -> float:
        """MiB per 1000 steps: the slope of a line through what was measured after the warm-up."""
        rest = np.array(measured[int(WARM_UP * len(measured)) :])
        places = np.arange(len(rest)) * steps / len(measured) / 1000
        return float(np.polyfit(places, rest, 1)[0])


@pytest.fixture
def no_pictures(monkeypatch):
    """matplotlib takes 40 MiB over the first dozen pictures of a process, and nothing after them: see below."""
    monkeypatch.setattr(loop, "plot_progress", lambda epochs, file: file.touch())
    monkeypatch.setattr(loop, "plot_views", lambda *arguments: None)


def tiny(method: str, folder: Path, epochs: int, steps: int, **fields: Any) -> tuple[Pretraining, Memory]:
    """A pretraining whose steps take milliseconds."""
    memory = Memory()
    settings = {"pretrain": {"epochs": epochs, "iterations_per_epoch": steps // epochs, "points_per_image": 5},
                "views": {"crop_fraction": (0.3, 1.0)}}
    task = make_task(method, folder, UnusualInput("as usual").reader(), geometry=ViewGeometry((12, 12), (1.0, 1.0)),
                     settings=settings, track=memory, log=lambda line: None, **fields)
    return pretraining_of(task), memory


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="memory is read from /proc")


@needs_proc
@pytest.mark.parametrize(("method", "workers"), [
    ("DVD-CL", 2), *(pytest.param(*one, marks=pytest.mark.nightly) for one in (
        ("DVD-CL", 0), ("S-MVD-CL", 2), ("PixPro", 0), ("MAE", 0), ("supervised", 0)))])
def test_a_long_pretraining_does_not_grow(method, workers, tmp_path, no_pictures):
    steps = 2000
    pretraining, memory = tiny(method, tmp_path, 20, steps, workers=workers)
    pretraining.run(resume=False)
    assert len(memory.own) == 20
    assert memory.growth(memory.own, steps) < MOST_MIB, memory.own
    alive = memory.workers[:-1]  # after the last epoch they may have ended
    assert all(len(epoch) == workers for epoch in alive)
    for worker in zip(*alive, strict=True):
        assert memory.growth(list(worker), steps * len(alive) // 20) < MOST_MIB, worker


@needs_proc
def test_the_measure_would_notice_rendered_views_that_are_kept(tmp_path, no_pictures):
    pretraining, memory = tiny("DVD-CL", tmp_path, 20, 200)
    kept: list[Tensor] = []
    render = pretraining.render

    def leaking(batch: Any, rows: Any) -> Tensor:
        kept.append(render(batch, rows).repeat(10, 1, 1, 1))
        return kept[-1][: len(rows)]

    pretraining.render = leaking  # type: ignore[method-assign]
    pretraining.run(resume=False)
    assert memory.growth(memory.own, 200) > MOST_MIB


@needs_proc
@pytest.mark.nightly
def test_the_pictures_of_many_epochs_do_not_grow(tmp_path):
    """Each of them draws progress.png."""
    pretraining, memory = tiny("DVD-CL", tmp_path, 60, 120)
    pretraining.run(resume=False)
    assert memory.own[-1] - memory.own[-21] < 2.0, memory.own
