"""The epoch loop alone: the order of its work, resumption, files, an epoch whose steps were all skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs import epochs
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from nnunet_cfcl.runs.epochs import EpochLoop, TrainingTask

EPOCHS, ITERATIONS, IMAGES = 3, 2, 4


class Indices(Dataset[Tensor]):
    """Sample n is n."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class Adding(EpochLoop[Tensor]):
    """Adds up the samples; notes what is called."""

    title, shown = "adding", "sum"

    def __init__(self, task: TrainingTask, epochs: int = EPOCHS) -> None:
        super().__init__(task, epochs, ITERATIONS, IMAGES, "pretrain.images_per_step")
        self.data, self.model, self.calls = Indices(), nn.Linear(1, 1), list[str]()
        self.sum, self.skipped = 0, 0.0

    def step(self, batch: Tensor, number: int) -> dict[str, float]:
        assert batch.tolist() == [IMAGES * number + image for image in range(IMAGES)]
        self.sum += int(batch.sum())
        self.calls.append(f"step {number}")
        return {"sum": float(self.sum), "skipped": self.skipped}

    def modules(self) -> Sequence[nn.Module]:
        return (self.model,)

    def state(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load_state(self, content: dict[str, Any]) -> None:
        self.sum = content["sum"]

    def check_identity(self, content: Mapping[str, Any]) -> None:
        assert content["identity"] == {"name": "adding"} and len(content["hash"]) > 5

    def all_skipped(self, last: Mapping[str, float]) -> tuple[str, str] | None:
        return None if last["skipped"] == 0.5 else (f"nothing added (sum {last['sum']:g})", "pretrain.initial_lr")

    def plot(self, lines: Sequence[Mapping[str, float]], file: Path) -> None:
        self.calls.append(f"plot {len(lines)}")
        file.touch()

    def report(self, line: Mapping[str, float]) -> None:
        saved = self.latest.exists() and load_checkpoint(self.latest)["epoch"]
        self.calls.append(f"report {line['epoch']} with {line['validated']} after saving {saved}")

    def begin(self) -> None:
        self.calls.append("begin")

    def validate(self) -> dict[str, float]:
        return {"validated": 7}

    def end_epoch(self, epoch: int) -> None:
        self.calls.append(f"end {epoch}")


def task(folder: Path, log=print, **fields: Any) -> TrainingTask:
    settings = resolve_settings({"pretrain": {"iterations_per_epoch": ITERATIONS, "images_per_step": IMAGES}})
    return TrainingTask(settings=settings, device=torch.device("cpu"), workers=0, folder=folder,
                        identity={"name": "adding"}, log=log, **fields)


def test_an_epoch_is_saved_before_it_is_reported(tmp_path):
    loop = Adding(task(tmp_path), epochs=2)
    loop.run(resume=False)
    assert loop.calls == [
        "begin", "step 0", "step 1", "plot 1", "report 0 with 7 after saving 1", "end 0",
        "step 2", "step 3", "plot 2", "report 1 with 7 after saving 2", "end 1"]


def test_the_final_checkpoint_takes_the_place_of_the_latest(tmp_path):
    loop = Adding(task(tmp_path))
    loop.run(resume=True)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint_final.pth", "log.jsonl", "progress.png"}
    content = load_checkpoint(loop.final)
    assert content["epoch"] == EPOCHS and content["sum"] == sum(range(EPOCHS * ITERATIONS * IMAGES))


def killed(loop: Adding, number: int) -> None:
    """Run it until step ``number``, where the machine is lost."""
    step = loop.step

    def until(batch: Tensor, current: int) -> dict[str, float]:
        if current == number:
            raise KeyboardInterrupt
        return step(batch, current)

    loop.step = until
    with pytest.raises(KeyboardInterrupt):
        loop.run(resume=True)


@pytest.mark.parametrize(("number", "first"), [(1, 0), (2, 2), (3, 2), (5, 4)])
def test_a_killed_run_resumes_at_the_first_step_of_the_epoch_it_was_in(tmp_path, number, first):
    said: list[str] = []
    killed(Adding(task(tmp_path)), number)
    loop = Adding(task(tmp_path, said.append))
    loop.run(resume=True)
    assert loop.calls[1] == f"step {first}" and loop.sum == sum(range(EPOCHS * ITERATIONS * IMAGES))
    assert any(f"Adding resumes after epoch {first // 2 - 1} (" in line for line in said) == (first > 0)


def test_without_resume_a_run_starts_over(tmp_path):
    killed(Adding(task(tmp_path)), 4)
    loop = Adding(task(tmp_path))
    loop.run(resume=False)
    assert loop.calls[1] == "step 0"


def test_a_kill_while_the_last_epoch_is_reported_costs_no_epoch(tmp_path, monkeypatch):
    loop = Adding(task(tmp_path))
    monkeypatch.setattr(loop, "save_final", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.run(resume=False)
    again = Adding(task(tmp_path))
    again.run(resume=True)
    assert again.calls == ["begin"] and load_checkpoint(again.final)["sum"] == loop.sum


def test_nothing_is_written_where_checkpoints_are_off(tmp_path):
    loop = Adding(task(tmp_path / "nothing", checkpoints=False))
    loop.run(resume=False)
    assert not (tmp_path / "nothing").exists()
    assert loop.calls[-2:] == ["report 2 with 7 after saving False", "end 2"]


def test_an_epoch_of_skipped_steps_is_an_error_that_names_the_setting_to_lower(tmp_path):
    loop = Adding(task(tmp_path))
    loop.skipped = 1.0
    with pytest.raises(UserError) as error:
        loop.run(resume=False)
    assert error.value.message == "adding epoch 0: nothing added (sum 28)"
    assert error.value.fix == ("look for extreme intensities with `nnunet_cfcl doctor --data`, or lower "
                               "pretrain.initial_lr")
    assert not loop.latest.exists()


def test_skipped_steps_are_no_error_where_the_training_says_so(tmp_path):
    loop = Adding(task(tmp_path))
    loop.skipped = 0.5
    loop.run(resume=False)
    assert loop.final.exists()


def test_every_step_and_every_epoch_is_progress_for_the_watchdog(tmp_path, monkeypatch):
    beats: list[int] = []

    class Watched:
        def __init__(self, what: str, log: Any) -> None:
            assert what == "adding"

        def __enter__(self):
            return lambda: beats.append(1)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(epochs, "watched", Watched)
    Adding(task(tmp_path)).run(resume=False)
    assert len(beats) == EPOCHS * (ITERATIONS + 1)
