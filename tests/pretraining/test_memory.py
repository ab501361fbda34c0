"""A long pretraining needs no more memory than a short one, worker processes included.

Every measurement has a process of its own: in that of the other tests what a leak keeps would fit into what they freed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from nnunet_cfcl.pretraining import loop
from nnunet_cfcl.views import ViewGeometry
from tests.pretraining.every_method import make_task, pretraining_of
from tests.pretraining.unusual_inputs import UnusualInput

#: Per 1000 steps. What a step holds is several times as much, so that keeping a hundredth of it would be noticed.
MOST_MIB = 2.0
WARM_UP = 0.3

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")


def resident_mib(process: int | None) -> float:
    """What a process holds in memory."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return float(lines["VmRSS"].split()[0]) / 1024


class Memory:
    """Looks at the memory after every epoch; ``track`` of a task."""

    def __init__(self) -> None:
        self.own: list[float] = []
        self.workers: list[list[float]] = []

    def __call__(self, line: Mapping[str, float]) -> None:
        self.own.append(resident_mib(os.getpid()))
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid or 0)
        self.workers.append([resident_mib(child.pid) for child in children])


def growth(measured: list[float], steps: int) -> float:
    """MiB per 1000 steps: the slope of a line through what was measured after the warm-up."""
    rest = np.array(measured[int(WARM_UP * len(measured)) :])
    places = np.arange(len(rest)) * steps / len(measured) / 1000
    return float(np.polyfit(places, rest, 1)[0])


def pretrain(
    method: str, folder: Path, epochs: int, steps: int, workers: int = 0, leak: bool = False, pictures: bool = False,
) -> Memory:
    """The memory of a pretraining whose steps take milliseconds.

    Args:
        leak: keep what was rendered.
        pictures: draw them; matplotlib takes 40 MiB over the first dozen pictures of a process, and nothing after them.
    """
    memory = Memory()
    settings = {"pretrain": {"epochs": epochs, "iterations_per_epoch": steps // epochs, "points_per_image": 5},
                "views": {"crop_fraction": (0.3, 1.0)}}
    task = make_task(method, folder, UnusualInput("as usual").reader(), geometry=ViewGeometry((12, 12), (1.0, 1.0)),
                     settings=settings, track=memory, log=lambda line: None, workers=workers)
    pretraining = pretraining_of(task)
    kept: list[Tensor] = []
    render = pretraining.render

    def leaking(batch: Any, rows: Any) -> Tensor:
        kept.append(render(batch, rows).repeat(10, 1, 1, 1))
        return kept[-1][: len(rows)]

    if leak:
        pretraining.render = leaking  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(loop, "plot_progress", lambda epochs, file: file.touch())
            patch.setattr(loop, "plot_views", lambda *arguments: None)
        pretraining.run(resume=False)
    return memory


def measured(*arguments: Any, **options: Any) -> Memory:
    """`pretrain` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(pretrain, *arguments, **options).result()


@pytest.mark.parametrize(("method", "workers"), [
    ("DVD-CL", 2), *(pytest.param(*one, marks=pytest.mark.nightly) for one in (
        ("DVD-CL", 0), ("S-MVD-CL", 2), ("PixPro", 0), ("MAE", 0), ("supervised", 0)))])
def test_a_long_pretraining_does_not_grow(method, workers, tmp_path):
    steps = 2000
    memory = measured(method, tmp_path, 20, steps, workers=workers)
    assert len(memory.own) == 20
    assert growth(memory.own, steps) < MOST_MIB, memory.own
    alive = memory.workers[:-1]  # after the last epoch they may have ended
    assert [len(epoch) for epoch in alive] == [workers] * 19
    for worker in zip(*alive, strict=True):
        assert growth(list(worker), steps * len(alive) // 20) < MOST_MIB, worker


def test_the_measure_would_notice_rendered_views_that_are_kept(tmp_path):
    assert growth(measured("DVD-CL", tmp_path, 20, 200, leak=True).own, 200) > MOST_MIB


@pytest.mark.nightly
def test_the_pictures_of_many_epochs_do_not_grow(tmp_path):
    """Each of them draws progress.png."""
    memory = measured("DVD-CL", tmp_path, 60, 120, pictures=True)
    assert memory.own[-1] - memory.own[-21] < 2.0, memory.own
