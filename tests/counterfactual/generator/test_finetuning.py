"""Counterfactual fine-tuning: what the predictor sees, the bound of the evidence, exact resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_cfcl.counterfactual.gate.attribute_predictor import AttributePredictor
from nnunet_cfcl.counterfactual.generator.code_adversary import value_targets
from nnunet_cfcl.counterfactual.generator.finetuning import (
    FIRST_MULTIPLIER,
    MEMORY,
    MULTIPLIER_RATE,
    STEPS_BEFORE,
    CounterfactualFineTuning,
    finetuned_identity,
)
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.ranks import Ranks
from tests.counterfactual.generator.tiny_training import (
    CODING,
    DISEASE,
    SCANNER,
    Killed,
    everything,
    killed_in_its_second_epoch,
    quick,
    tiny_task,
)
from tests.runs.crew import Crew

SHORT = {"finetune_epochs": 2, "finetune_lr": 1e-3}


@pytest.fixture(autouse=True)
def without_pictures():
    with quick():
        yield


class ByBrightness(nn.Module):
    """Tells scanner B by a mean above 0, nnU-Net's intensities, and the disease not at all."""

    attributes = (SCANNER, DISEASE)

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.seen: list[torch.Tensor] = []

    def log_probabilities(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(images.detach())
        logit = self.slope * images.flatten(1).mean(1)
        return {"scanner": torch.stack([-logit, logit], 1).log_softmax(1),
                "disease": torch.zeros(len(images), 3).log_softmax(1)}


def finetuning(folder: Path, ranks: Ranks = Ranks(), **settings: Any) -> CounterfactualFineTuning:  # noqa: B008
    task = tiny_task(folder, ranks, **{**SHORT, **settings})
    return CounterfactualFineTuning(task, GeneratorTraining(task).generator(), ByBrightness())


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "finetuning/log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- what is learned


def test_the_predictors_loss_goes_down_where_the_effect_is_easy(tmp_path):
    tuning = finetuning(tmp_path, iterations_per_epoch=30, finetune_lr=5e-3, finetune_slack=5.0, invariance=0,
                        realism=0)
    tuning.multiplier = 1.0
    tuning.run(resume=False)
    first, last = log_of(tmp_path)
    assert last["predictor"] < 0.7 * first["predictor"]


@pytest.mark.parametrize("learned", [True, False])
def test_the_predictor_sees_the_counterfactuals_that_the_generator_makes(tmp_path, learned):
    tuning = finetuning(tmp_path, scale=None if learned else 0.3)
    with torch.no_grad():  # so that the scale and the parents matter
        for parameter in tuning.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = next(tuning.batches(0))
    tuning._backward(batch, 0)
    noise = tuning.model.draw_noise(tuning._noise_generator(0), len(batch.image))
    generator = CounterfactualGenerator(tuning.model, CODING, tuning.scale, {})
    seen = generator.scale.backward(generator.scale.forward(batch.image))  # as clipped as the model sees them
    change = generator.changes(batch.image, batch.parents, [batch.others], noise)[0]
    torch.testing.assert_close(tuning.predictor.seen[0], change.apply(seen), rtol=1e-4, atol=1e-4)
    assert (change.apply(seen) - seen).abs().mean() > 1e-3


def test_the_cross_entropy_is_that_of_a_slow_loop_over_what_is_known(tmp_path):
    tuning = finetuning(tmp_path)
    cells = [{"scanner": "A"}, {"scanner": "B", "disease": "no"}, {}]
    parents, images = torch.stack([CODING.encode(one) for one in cells]), torch.randn(3, 1, 16, 16)
    found = tuning.predictor.log_probabilities(images)
    scanner = -(found["scanner"][0, 0] + found["scanner"][1, 1]) / 2
    disease = -found["disease"][1, 1]
    torch.testing.assert_close(tuning._cross_entropy(images, parents), (scanner + disease) / 2)
    assert value_targets(parents, CODING, [SCANNER]).sum() == 2


def test_it_begins_with_the_generator_which_stays_as_it_is_like_the_predictor(tmp_path):
    task = tiny_task(tmp_path, **SHORT)
    generator, predictor = GeneratorTraining(task).generator(), ByBrightness()
    before = {key: value.clone() for key, value in generator.model.state_dict().items()}
    tuning = CounterfactualFineTuning(task, generator, predictor)
    for state in (tuning.model.state_dict(), tuning.generator().model.state_dict()):
        assert all(torch.equal(value, before[key]) for key, value in state.items())
    tuning.run(resume=False)
    assert all(torch.equal(value, before[key]) for key, value in generator.model.state_dict().items())
    assert float(predictor.slope) == 3 and predictor.slope.grad is None
    assert any(not torch.equal(value, before[key]) for key, value in tuning.model.state_dict().items())


def test_a_real_predictor_is_a_teacher(tmp_path):
    task = tiny_task(tmp_path, **SHORT)
    predictor = AttributePredictor(CODING.attributes, (16, 16), 1, "residual", task.scale).eval().requires_grad_(False)
    before = {key: value.clone() for key, value in predictor.state_dict().items()}
    tuning = CounterfactualFineTuning(task, GeneratorTraining(task).generator(), predictor)
    statistics = tuning.step(next(tuning.batches(0)), 0)
    assert statistics["skipped"] == 0 and 0 < statistics["predictor"] < 5
    assert all(torch.equal(value, before[key]) for key, value in predictor.state_dict().items())


def test_its_files_lie_beside_those_of_the_training_and_replace_none(tmp_path):
    task = tiny_task(tmp_path, **SHORT)
    training = GeneratorTraining(task)
    training.run(resume=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    CounterfactualFineTuning(task, training.generator(), ByBrightness()).run(resume=True)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert after == {**before, "generator_finetuned.pth": after["generator_finetuned.pth"]}
    assert {file.name for file in (tmp_path / "finetuning").iterdir()} == {
        "log.jsonl", "progress.png", "samples_epoch_0002.png"}
    made = CounterfactualGenerator.load(CounterfactualFineTuning.final_in(tmp_path))
    assert made.identity == finetuned_identity(task)
    assert {"predictor", "multiplier", "negative_evidence"} <= set(log_of(tmp_path)[0])


def test_length_rate_and_beta_are_those_of_the_fine_tuning(tmp_path):
    tuning = finetuning(tmp_path, finetune_epochs=7, finetune_lr=1e-5, warmup_steps=0, beta=2.0,
                        beta_warmup_fraction=0.5)
    assert (tuning.epochs, tuning._rate(0), tuning._beta(0)) == (7, 1e-5, 2.0)


# ---------------------------------------------------------------- the bound


def follow(tuning: CounterfactualFineTuning, values: list[float]) -> list[float]:
    multipliers = []
    for value in values:
        tuning._follow(value)
        multipliers.append(tuning.multiplier)
    return multipliers


def test_the_mean_of_the_first_steps_sets_the_bound_and_the_multiplier_waits_for_it(tmp_path):
    tuning = finetuning(tmp_path, finetune_slack=0.25)
    values = [3.0 + math.sin(n) for n in range(STEPS_BEFORE)]
    assert follow(tuning, values) == [FIRST_MULTIPLIER] * STEPS_BEFORE
    assert tuning.bound == pytest.approx(sum(values) / STEPS_BEFORE + 0.25)
    bound = tuning.bound
    follow(tuning, [100.0])
    assert tuning.bound == bound


def test_the_multiplier_follows_the_violation_of_the_bound(tmp_path):
    tuning = finetuning(tmp_path, finetune_slack=0.5)
    follow(tuning, [1.0] * STEPS_BEFORE)
    values = [1.0, 4.0, 4.0, 2.0, 0.0, -5.0]
    average, multiplier, expected = 1.0, FIRST_MULTIPLIER, []
    for value in values:
        average = MEMORY * average + (1 - MEMORY) * value
        multiplier += MULTIPLIER_RATE * (average - 1.5)
        expected.append(multiplier)
    assert follow(tuning, values) == pytest.approx(expected)


def test_it_rises_beyond_the_bound_falls_below_it_and_is_never_negative(tmp_path):
    tuning = finetuning(tmp_path, finetune_slack=0.1)
    follow(tuning, [1.0] * STEPS_BEFORE)
    falling = follow(tuning, [1.0] * 30)
    assert all(one > other for one, other in zip(falling, falling[1:], strict=False))
    rising = follow(tuning, [5.0] * 30)
    assert all(one < other for one, other in zip(rising, rising[1:], strict=False))
    assert follow(tuning, [-50.0] * 60)[-1] == 0


def test_a_skipped_step_does_not_move_the_multiplier(tmp_path):
    tuning = finetuning(tmp_path)
    data = tuning.batches(0)
    tuning.step(next(data), 0)
    before = tuning._constraint()
    batch = next(data)
    statistics = tuning.step(batch._replace(parents=batch.parents * math.nan), 1)
    assert statistics["skipped"] == 1 and tuning._constraint() == before
    tuning.step(next(data), 2)
    assert tuning._steps_seen == 2 and all(math.isfinite(value) for value in tuning._constraint())


@pytest.mark.parametrize("images_per_pass", [5, 2, 1])
def test_all_passes_of_a_step_have_one_multiplier_and_their_mean_is_followed(tmp_path, images_per_pass):
    found = []
    for passes in (5, images_per_pass):
        task = tiny_task(tmp_path, images_per_pass=passes, invariance=0, realism=0, **SHORT)
        tuning = CounterfactualFineTuning(task, GeneratorTraining(task).generator(), ByBrightness())
        statistics = tuning.step(next(tuning.batches(0)), 0)
        found.append((statistics["multiplier"], statistics["negative_evidence"], tuning.bound,
                      statistics["gradient_norm"]))
        assert statistics["multiplier"] == FIRST_MULTIPLIER
        assert tuning.bound == pytest.approx(statistics["negative_evidence"] + tuning.settings.finetune_slack)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# ---------------------------------------------------------------- resumption and processes


def test_a_run_killed_in_its_second_epoch_and_resumed_ends_with_the_same_weights_and_multiplier(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_cfcl.counterfactual.generator.finetuning.STEPS_BEFORE", 2)
    whole = finetuning(tmp_path / "whole", dropout=0.1)
    whole.run(resume=True)
    with pytest.raises(Killed):
        killed_in_its_second_epoch(finetuning(tmp_path / "killed", dropout=0.1)).run(resume=True)
    resumed = finetuning(tmp_path / "killed", dropout=0.1)
    resumed.run(resume=True)
    expected, found = everything(whole), everything(resumed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert resumed._constraint() == whole._constraint() and whole.multiplier != FIRST_MULTIPLIER
    assert [line["epoch"] for line in log_of(tmp_path / "killed")] == [0, 1]


def tuned(ranks: Ranks, folder: Path) -> tuple[dict[str, np.ndarray], tuple[float, ...]]:
    """After three steps, without sampled noise, which is each process's own."""
    with quick():
        tuning = finetuning(folder / f"rank_{ranks.rank}", ranks, invariance=0, realism=0)
        tuning.model.draw_noise = lambda generator, count: [
            torch.zeros(count, *shape) for shape in tuning.model.decoder.code_shapes()]
        data = tuning.batches(0)
        for number in range(3):
            tuning.step(next(data), number)
        return {key: value.numpy() for key, value in tuning.model.state_dict().items()}, tuning._constraint()


def test_a_checkpoint_of_another_fine_tuning_is_rejected_and_the_training_need_not_be_deleted(tmp_path):
    with pytest.raises(Killed):
        killed_in_its_second_epoch(finetuning(tmp_path)).run(resume=True)
    with pytest.raises(UserError, match=r"finetuning_latest.pth was made with other settings.*delete this file"):
        finetuning(tmp_path, finetune_lr=5e-4).run(resume=True)


def test_two_processes_have_the_bound_and_the_weights_of_one(tmp_path):
    crew = Crew(2, tmp_path)
    try:
        (first, bound), (second, other_bound) = crew(tuned, tmp_path / "two")
    finally:
        crew.close()
    expected, expected_bound = tuned(Ranks(), tmp_path / "one")
    assert bound == other_bound and bound == pytest.approx(expected_bound, rel=1e-4)
    for key, value in expected.items():
        np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_allclose(first[key], value, rtol=2e-3, atol=2e-3, err_msg=key)
