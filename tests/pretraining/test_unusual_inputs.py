"""Unusual images and numbers that are not finite, in the real loop, for every kind of method."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_cfcl.counterfactual.source import AcquisitionSource, PrecomputedSource
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.pretraining import loop
from nnunet_cfcl.pretraining.loop import Pretraining
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from tests.pretraining.every_method import DIFFERENT, METHODS, make_task, pretraining_of
from tests.pretraining.unusual_inputs import INPUTS, UnusualInput, in_words, try_input, with_voxel

STEPS = {"pretrain": {"iterations_per_epoch": 4}}
WITH_COUNTERFACTUALS = [name for name, method in METHODS.items() if method.counterfactuals]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than the training."""
    monkeypatch.setattr(loop, "plot_progress", lambda epochs, file: file.touch())
    monkeypatch.setattr(loop, "plot_views", lambda *arguments: None)


@pytest.mark.parametrize("method", DIFFERENT)
@pytest.mark.parametrize("unusual", INPUTS, ids=lambda unusual: unusual.name)
def test_an_unusual_input_trains_with_finite_numbers_or_is_refused_in_words(unusual, method, tmp_path):
    outcome = try_input(unusual, method, tmp_path)
    assert outcome.finite
    if unusual.refused:
        assert outcome.refusal is not None and re.search(unusual.refused, outcome.refusal)
    else:
        assert outcome.refusal is None
        assert len(outcome.losses) == 1 and math.isfinite(outcome.losses[0])
        assert outcome.skipped == (0.5 if method in unusual.skips else 0)


def test_the_table_for_the_documentation_says_what_happened(tmp_path):
    refused, trained, skipped = (
        next(one for one in INPUTS if one.name == name) for name in ("one NaN voxel", "four channels",
                                                                     "one voxel of 1e30"))
    assert in_words(try_input(refused, "MAE", tmp_path)).startswith("refused: case 'case_1' holds values")
    assert in_words(try_input(trained, "MAE", tmp_path)) == "trains, all numbers finite"
    assert in_words(try_input(skipped, "MAE", tmp_path)) == "50% of the steps skipped"


class Poison:
    """NaN in the calls of something that are numbered; every call counts."""

    def __init__(self, calls: Callable[[int], bool]) -> None:
        self.calls, self.number = calls, 0

    def __call__(self, value: Tensor) -> Tensor:
        hit = self.calls(self.number)
        self.number += 1
        return torch.full_like(value, torch.nan) if hit else value


class PoisonedSource(AcquisitionSource):
    """Acquisitions of which some have no finite voxel, as a generator that has diverged would make them."""

    poison = Poison(lambda call: False)

    def apply(self, originals: Tensor, drawn: Any, spacing: Any) -> Tensor:
        return self.poison(super().apply(originals, drawn, spacing))


def in_a_gradient(pretraining: Pretraining, poison: Poison) -> None:
    pretraining.parameters[0].register_hook(poison)


def in_a_view(pretraining: Pretraining, poison: Poison) -> None:
    render = pretraining.render
    pretraining.render = lambda batch, rows: poison(render(batch, rows))  # type: ignore[method-assign]


def in_a_counterfactual(pretraining: Pretraining, poison: Poison) -> None:
    source = pretraining.task.source
    assert isinstance(source, PoisonedSource)
    source.poison = poison


POISONS = [(method, fault) for method in METHODS for fault in (in_a_gradient, in_a_view)]
POISONS += [(method, in_a_counterfactual) for method in WITH_COUNTERFACTUALS]


def poisoned(method: str, fault: Callable[[Pretraining, Poison], None], calls, folder, log=print) -> Pretraining:
    usual = UnusualInput("as usual").reader()
    task = make_task(method, folder, usual, settings=STEPS, log=log)
    source = PoisonedSource(usual, task.settings.acquisition, ["ZScoreNormalization"], 2)
    pretraining = pretraining_of(make_task(method, folder, usual, settings=STEPS, log=log, source=source))
    fault(pretraining, Poison(calls))
    return pretraining


@pytest.mark.parametrize(("method", "fault"), POISONS)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_ones_train(method, fault, tmp_path):
    pretraining = poisoned(method, fault, lambda call: call == 1, tmp_path)
    batches, after = pretraining.batches(0), []
    for number in range(3):
        statistics = pretraining.step(next(batches), number)
        assert statistics["skipped"] == (number == 1)
        weights = [parameter.detach().clone() for parameter in pretraining.parameters]
        moments = [value.clone() for state in pretraining.optimizer.state.values() for value in state.values()]
        after.append((weights, moments))
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(after[0], after[1])]
    assert same == [True, True]
    assert not all(torch.equal(a, b) for a, b in zip(after[1][0], after[2][0], strict=True))
    assert all(bool(value.isfinite().all()) for value in pretraining.model.state_dict().values())


@pytest.mark.parametrize("method", DIFFERENT)
def test_skipped_steps_are_counted_in_the_log_and_left_out_of_the_mean_loss(method, tmp_path):
    said: list[str] = []
    pretraining = poisoned(method, in_a_view, lambda call: call == 1, tmp_path, said.append)
    pretraining.run(resume=False)
    (line,) = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["skipped"] == 0.25 and math.isfinite(line["loss"])
    assert any("25% of the steps skipped (gradients not finite)" in text for text in said)


@pytest.mark.parametrize(("method", "fault"), POISONS)
def test_an_epoch_without_a_finite_step_ends_the_run_and_leaves_no_checkpoint(method, fault, tmp_path):
    pretraining = poisoned(method, fault, lambda call: True, tmp_path)
    with pytest.raises(UserError, match=r"epoch 0: no step had finite gradients .*doctor --data.*initial_lr"):
        pretraining.run(resume=False)
    assert not list(tmp_path.glob("*.pth"))


def test_a_counterfactual_of_a_store_that_is_not_finite_is_refused_by_name(tmp_path):
    reader = UnusualInput("as usual").reader()
    store = CounterfactualStore.create(tmp_path / "store", ["scanner"], "test")
    for case, image in reader.arrays.items():
        store.write(case, "scanner", with_voxel(math.inf, 0)(0) if case == "case_0" else image)
    pretraining = pretraining_of(make_task("DVD-CL", tmp_path, reader, source=PrecomputedSource(store)))
    with pytest.raises(UserError, match=r"counterfactual 'scanner' of case 'case_0' holds values that are not finite"):
        pretraining.run(resume=False)


def test_a_skipped_step_leaves_the_statistics_of_batch_norms(tmp_path):
    reader = UnusualInput("as usual").reader()
    network = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6))
    pretraining = Pretraining(network, network, 6, make_task("DVD-CL", tmp_path, reader, settings=STEPS))
    in_a_view(pretraining, Poison(lambda call: call == 1))
    pretraining.run(resume=False)
    kept = load_checkpoint(tmp_path / "checkpoint_final.pth")["network_weights"]
    assert all(bool(value.isfinite().all()) for value in kept.values())
    assert int(kept["1.num_batches_tracked"]) == 3 and bool((kept["1.running_mean"] != 0).all())


@pytest.mark.parametrize(("steps", "ends"), [(4, False), (20, True)])
def test_a_gradient_scaler_may_search_its_scale_but_not_for_ever(steps, ends, tmp_path):
    """On a GPU the first steps are skipped while the scale is halved; with no scale at all there is nothing to find."""
    settings = {"pretrain": {"iterations_per_epoch": steps}}
    task = make_task("MAE", tmp_path, UnusualInput("as usual").reader(), settings=settings)
    pretraining = pretraining_of(task)
    pretraining.scaler = torch.amp.GradScaler("cpu")
    in_a_gradient(pretraining, Poison(lambda call: True))
    if not ends:
        pretraining.run(resume=False)
        return
    with pytest.raises(UserError, match="no step had finite gradients"):
        pretraining.run(resume=False)
