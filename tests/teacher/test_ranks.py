"""Two processes (gloo, on the CPU): averaged gradients, identical students and teachers, one set of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.teacher import loop
from tests.runs.crew import Crew
from tests.teacher.conftest import tiny_training


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    made = Crew(2, tmp_path_factory.mktemp("crew"))
    yield made
    made.close()


def gradients(ranks: Ranks, folder: Path, alone: bool) -> list[torch.Tensor]:
    """Of one step, before the ranks' gradients are summed where each works alone."""
    training = tiny_training(folder, {"teacher.mix_probability": 0}, ranks=ranks)
    if alone:
        training.ranks = Ranks(ranks.rank, 1)
    # the gradients are read, not the weights after a step; clipping would scale them
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(loop, "scaled_step", lambda *_: 0.0)
    training.step(next(training.batches(0)), 0)
    monkeypatch.undo()
    return [p.grad.clone() for p in training.parameters]


def trained(ranks: Ranks, folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    # every rank begins with other weights, as after an initialisation without a seed
    training = tiny_training(folder, ranks=ranks)
    training.run(resume=False)
    student, teacher = (list(one.state_dict().values()) for one in (training.plain, training.average))
    return student, teacher, training.shares.found.tolist()


def test_gradients_are_the_mean_of_the_ranks_own(crew, tmp_path):
    own = crew(gradients, tmp_path / "own", True)
    together = crew(gradients, tmp_path / "together", False)
    for rank in together:
        for found, one, other in zip(rank, *own, strict=True):
            assert torch.allclose(found, (one + other) / 2, atol=1e-6)


def test_student_and_teacher_are_identical_on_all_ranks(crew, tmp_path):
    (student, teacher, found), (other_student, other_teacher, other_found) = crew(trained, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(student, other_student, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(teacher, other_teacher, strict=True))
    assert found == other_found
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "checkpoint_final.pth", "log.jsonl", "progress.png", "pseudo_labels.png"]
