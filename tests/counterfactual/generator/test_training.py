"""The training of the generator: exact resumption, passes, processes, skipped steps, schedules, files."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_cfcl.counterfactual.generator import training as generator_training
from nnunet_cfcl.counterfactual.generator.data import draw_patches
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.hvae import Evidence
from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs import epochs
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from nnunet_cfcl.runs.ranks import Ranks
from tests.counterfactual.generator.tiny_training import (
    BRIGHTER,
    CODING,
    Killed,
    everything,
    killed_in_its_second_epoch,
    quick,
    tiny_task,
)
from tests.runs.crew import Crew
from tests.runs.watching import noted_work


@pytest.fixture(autouse=True)
def without_pictures():
    with quick():
        yield


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    made = Crew(2, tmp_path_factory.mktemp("crew"))
    yield made
    made.close()


def trained(task, resume=False) -> GeneratorTraining:
    training = GeneratorTraining(task)
    training.run(resume)
    return training


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize(("dim", "changed"), [(2, {"dropout": 0.2, "parents_dropped": 0.3, "shift": 0.2}), (3, {})])
def test_a_run_killed_in_its_second_epoch_and_resumed_ends_with_the_same_weights(tmp_path, dim, changed):
    whole = trained(tiny_task(tmp_path / "whole", dim=dim, **changed))
    task = tiny_task(tmp_path / "killed", dim=dim, **changed)
    with pytest.raises(Killed):
        killed_in_its_second_epoch(GeneratorTraining(task)).run(resume=True)
    (task.folder / "log.jsonl").open("a").write('{"epoch": 1, "cut sho')
    torch.manual_seed(1234)  # whatever else the process did
    resumed = trained(task, resume=True)
    assert_equal(everything(resumed), everything(whole))
    assert [line["epoch"] for line in log_of(task.folder)] == [0, 1]
    for one, other in zip(log_of(task.folder), log_of(whole.task.folder), strict=True):
        for key in one.keys() - {"seconds", "images_per_second"}:
            assert one[key] == other[key], key


def test_without_resume_a_run_begins_anew(tmp_path):
    task = tiny_task(tmp_path)
    with pytest.raises(Killed):
        killed_in_its_second_epoch(GeneratorTraining(task)).run(resume=False)
    again = trained(task)
    assert_equal(everything(again), everything(trained(tiny_task(tmp_path / "other"))))


def test_the_run_leaves_a_generator_a_log_and_pictures(tmp_path):
    lines: list[str] = []
    task = tiny_task(tmp_path / "run", log=lines.append, epochs=3, samples_every=2)
    training = GeneratorTraining(task)
    training.run(resume=False)
    assert {file.name for file in task.folder.iterdir()} == {
        "generator.pth", "log.jsonl", "progress.png", "samples_epoch_0002.png", "samples_epoch_0003.png"}
    assert training.final == GeneratorTraining.final_in(task.folder)
    loaded = CounterfactualGenerator.load(training.final)
    patches = draw_patches(task.reader, task.cells, task.validation, (16, 16), 3, 0)
    parents, others = patches.parents(CODING), torch.stack([CODING.encode({"scanner": "B"})] * 3)
    assert torch.equal(loaded.counterfactuals(patches.images, parents, others),
                       training.generator().counterfactuals(patches.images, parents, others))
    assert loaded.identity == task.identity
    first = log_of(task.folder)[0]
    assert set(first) == {
        "epoch", "nll", "kl", "kl_1", "kl_2", "kl_3", "code_adversary", "image_adversary", "beta", "learning_rate",
        "gradient_norm", "skipped", "validation_nll", "validation_kl", "seconds", "images_per_second"}
    assert all(math.isfinite(value) for value in first.values())
    assert first["kl"] == pytest.approx(first["kl_1"] + first["kl_2"] + first["kl_3"])
    assert len(lines) == 3 and lines[0].startswith("Generator training epoch 0: NLL") and "of guessing" in lines[0]


def test_what_is_used_are_the_averaged_weights(tmp_path):
    training = trained(tiny_task(tmp_path))
    state = CounterfactualGenerator.load(training.final).model.state_dict()
    averaged, raw = training.average.module.state_dict(), training.model.state_dict()
    assert all(torch.equal(state[key], averaged[key]) for key in state)
    assert any(not torch.equal(state[key], raw[key]) for key in state)


@pytest.mark.parametrize("off", [{"invariance": 0}, {"realism": 0}, {"invariance": 0, "realism": 0}])
def test_adversaries_that_are_switched_off_learn_nothing_and_are_not_in_the_log(tmp_path, off):
    task = tiny_task(tmp_path, epochs=1, **off)
    before = everything(GeneratorTraining(task))
    after = everything(trained(task))
    for number, name, setting in ((0, "code_adversary", "invariance"), (1, "image_adversary", "realism")):
        keys = [key for key in before if key.startswith(f"adversaries.{number}.")]
        assert all(torch.equal(before[key], after[key]) for key in keys) == (setting in off)
        assert (name not in log_of(tmp_path)[0]) == (setting in off)


def test_a_short_training_finds_what_the_scanner_does(tmp_path):
    task = tiny_task(tmp_path, epochs=2, iterations_per_epoch=60, images_per_step=8, images_per_pass=8, ema=0.95,
                     initial_lr=5e-3, invariance=0, realism=0)
    generator = trained(task).generator()
    lines = log_of(tmp_path)
    assert lines[1]["validation_nll"] < lines[0]["validation_nll"] < 1.4
    patches = draw_patches(task.reader, task.cells, task.validation, (16, 16), 12, 0)
    others = [{**cells, "scanner": "AB"[cells["scanner"] == "A"]} for cells in patches.cells]
    made = generator.counterfactuals(
        patches.images, patches.parents(CODING), torch.stack([CODING.encode(one) for one in others]))
    moved = (made - patches.images).flatten(1).mean(1)
    for cells, move in zip(patches.cells, moved.tolist(), strict=True):
        assert 0.4 < move * (1 if cells["scanner"] == "A" else -1) / BRIGHTER < 1.6, (cells, move)


# ---------------------------------------------------------------- passes and processes


def calm(training: GeneratorTraining) -> GeneratorTraining:
    """Without what depends on the number of passes or processes by design: power iterations and sampled noise."""
    training.adversaries.eval()
    training.model.draw_noise = lambda generator, count: [
        torch.zeros(count, *shape) for shape in training.model.decoder.code_shapes()]
    return training


def gradients_of(training: GeneratorTraining) -> torch.Tensor:
    modules = (training.model, training.adversaries)
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("dim", [2, 3])
def test_several_passes_give_the_gradients_and_statistics_of_one(tmp_path, dim):
    found = []
    for images_per_pass in (5, 3, 2, 1):
        training = calm(GeneratorTraining(tiny_task(tmp_path, dim=dim, images_per_pass=images_per_pass)))
        statistics = training._backward(next(training.batches(0)), 4)
        found.append((gradients_of(training), statistics))
    assert found[0][0].abs().max() > 1e-3 and found[0][1]["image_adversary"] > 0
    for gradients, statistics in found[1:]:
        torch.testing.assert_close(gradients, found[0][0], rtol=1e-3, atol=1e-5)
        assert statistics == pytest.approx(found[0][1], rel=1e-4)


def test_the_noise_of_a_step_is_the_same_however_many_passes_it_takes(tmp_path):
    """Were it drawn pass by pass, several passes could not give what one gives."""
    found = []
    for images_per_pass in (5, 2):
        training = GeneratorTraining(tiny_task(tmp_path, images_per_pass=images_per_pass, invariance=0, realism=0))
        training._backward(next(training.batches(0)), 4)
        found.append(gradients_of(training))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def train_calmly(ranks: Ranks, folder: Path, killed: bool = False, resume: bool = False) -> dict[str, np.ndarray]:
    """A tiny run in a folder of this rank's own, whose draws do not depend on the number of processes."""
    with quick():
        training = calm(GeneratorTraining(tiny_task(folder / f"rank_{ranks.rank}", ranks)))
        if killed:
            killed_in_its_second_epoch(training)
        with suppress(Killed):
            training.run(resume)
        return {key: value.numpy() for key, value in everything(training).items()}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


def test_two_processes_end_with_the_weights_of_one_and_the_first_writes_the_files(crew, tmp_path):
    expected = train_calmly(Ranks(), tmp_path / "one")
    first, second = crew(train_calmly, tmp_path / "two")
    assert_close(first, expected, 2e-3)
    assert_close(second, first, 0)
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["rank_0"]
    assert {file.name for file in (tmp_path / "two/rank_0").iterdir()} == {
        "generator.pth", "log.jsonl", "progress.png", "samples_epoch_0002.png"}
    assert [line["epoch"] for line in log_of(tmp_path / "two/rank_0")] == [0, 1]


def test_a_run_of_two_processes_is_gone_on_with_from_the_first_ones_file(crew, tmp_path):
    whole = crew(train_calmly, tmp_path / "whole")
    crew(train_calmly, tmp_path / "cut", True)
    assert load_checkpoint(tmp_path / "cut/rank_0/checkpoint_latest.pth")["epoch"] == 1
    for found, expected in zip(crew(train_calmly, tmp_path / "cut", False, True), whole, strict=True):
        assert_close(found, expected, 0)


def draws_of(ranks: Ranks, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """This rank's images and the noise of its first code."""
    with quick():
        training = GeneratorTraining(tiny_task(folder, ranks, images_per_step=4))
    noise = training.model.draw_noise(training._noise_generator(0), len(training.images))
    return next(training.batches(0)).image.numpy(), noise[0].numpy()


def test_processes_share_the_images_and_draw_noise_of_their_own(crew, tmp_path):
    images, _ = draws_of(Ranks(), tmp_path)
    (first, noise), (second, other_noise) = crew(draws_of, tmp_path)
    np.testing.assert_array_equal(np.concatenate([first, second]), images)
    assert noise.shape == other_noise.shape and not np.array_equal(noise, other_noise)


# ---------------------------------------------------------------- steps


def spoilt(training: GeneratorTraining, factor: float) -> GeneratorTraining:
    """Its loss is multiplied by ``factor`` in step 1."""
    loss = training._loss

    def spoil(evidence, sample, number):
        found, numbers = loss(evidence, sample, number)
        return (factor * found if number == 1 else found), numbers

    training._loss = spoil
    return training


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e8])
def test_a_step_without_usable_gradients_is_skipped_and_changes_nothing(tmp_path, factor):
    training = spoilt(GeneratorTraining(tiny_task(tmp_path)), factor)
    data = training.batches(0)
    assert training.step(next(data), 0)["skipped"] == 0
    before = everything(training)
    moments = [value.clone() for state in training.optimizer.state.values() for value in state.values()]
    statistics = training.step(next(data), 1)
    assert statistics["skipped"] == 1 and not statistics["gradient_norm"] <= training.settings.skip_norm
    changed = {key for key, value in everything(training).items() if not torch.equal(value, before[key])}
    # the power iterations of the spectral norms go on, which follow the weights
    assert all("parametrizations" in key and key[-2:] in ("_u", "_v") for key in changed)
    after = [value for state in training.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(one, other) for one, other in zip(moments, after, strict=True))
    assert training.step(next(data), 2)["skipped"] == 0
    assert all(value.isfinite().all() for value in everything(training).values())


def test_a_gradient_of_an_adversary_that_is_not_finite_is_skipped_too(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path))
    data = training.batches(0)
    assert training.step(next(data), 0)["skipped"] == 0
    hook = next(training.adversaries.parameters()).register_hook(lambda gradient: math.nan * gradient)
    assert training.step(next(data), 1)["skipped"] == 1
    hook.remove()
    assert training.step(next(data), 2)["skipped"] == 0
    assert all(value.isfinite().all() for value in everything(training).values())


def test_skipped_steps_are_logged(tmp_path):
    lines: list[str] = []
    spoilt(GeneratorTraining(tiny_task(tmp_path, log=lines.append)), math.nan).run(resume=False)
    assert "33% of the steps skipped" in lines[0] and "skipped" not in lines[1]
    first = log_of(tmp_path)[0]
    assert first["skipped"] == pytest.approx(1 / 3) and math.isfinite(first["gradient_norm"])


def test_an_epoch_of_skipped_steps_is_an_error_with_a_fix(tmp_path):
    with pytest.raises(UserError, match=r"epoch 0: no step had gradients of a norm below 1e-06 .*doctor --data"):
        trained(tiny_task(tmp_path, skip_norm=1e-6))


def test_an_epoch_that_an_adversary_spoils_names_the_adversaries(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path))
    next(training.adversaries.parameters()).register_hook(lambda gradient: math.nan * gradient)
    with pytest.raises(UserError, match=r"epoch 0: no .*finite gradients of the adversaries; fix: .*adversary_lr"):
        training.run(resume=False)


def test_the_norm_is_clipped_before_the_step_and_logged_before_clipping(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path, clip_norm=1e-3))
    statistics = training.step(next(training.batches(0)), 0)
    norm = torch.stack([p.grad.norm() for p in training.model.parameters() if p.grad is not None]).norm()
    assert statistics["gradient_norm"] > 0.01 and float(norm) == pytest.approx(1e-3, rel=1e-2)


# ---------------------------------------------------------------- schedules


def test_the_average_forgets_fast_at_first_and_then_as_the_setting_says(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path, ema=0.5))
    data = training.batches(0)
    averaged = None
    for number in range(6):
        training.step(next(data), number)
        current = training.model.decoder.mean.bias.detach().clone()
        if averaged is None:
            averaged = current  # the first step's weights are the average
        else:
            decay = min(0.5, (1 + number) / (10 + number))
            averaged = decay * averaged + (1 - decay) * current
        torch.testing.assert_close(training.average.module.decoder.mean.bias, averaged)
    assert int(training.average.n_averaged) == 6


def test_beta_rises_linearly_to_its_value(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path, epochs=10, iterations_per_epoch=10, beta=3.0,
                                           beta_warmup_fraction=0.2))
    assert [training._beta(number) for number in (0, 9, 18, 19, 50)] == pytest.approx([0.15, 1.5, 2.85, 3, 3])
    none = GeneratorTraining(tiny_task(tmp_path, beta=3.0, beta_warmup_fraction=0))
    assert none._beta(0) == 3


def test_the_rate_rises_linearly_and_falls_to_a_fiftieth(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path, epochs=10, iterations_per_epoch=100, warmup_steps=100))
    rates = [training._rate(number) for number in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and rates[49] == pytest.approx(5e-4, rel=0.01)
    assert max(rates) == pytest.approx(1e-3, rel=0.03) and 95 <= rates.index(max(rates)) <= 105
    assert rates[500] == pytest.approx(1e-3 * 0.51) and rates[999] == pytest.approx(2e-5, rel=0.01)
    assert all(one >= other for one, other in zip(rates[105:], rates[106:], strict=False))


def test_the_adversaries_are_heeded_after_they_have_learned_to_look(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path, epochs=10, iterations_per_epoch=10))
    assert [training._adversary_weight(number) for number in (0, 1, 5, 60)] == pytest.approx([0, 0.2, 1, 1])


def test_a_resolution_costs_nothing_below_its_free_bits(tmp_path):
    training = GeneratorTraining(tiny_task(tmp_path, free_bits=0.1, beta_warmup_fraction=0, beta=2.0))
    kl = torch.tensor([[0.0, 0.0], [0.05, 0.25], [0.1, 0.02], [0.5, 0.7]], requires_grad=True)
    evidence = Evidence(None, torch.tensor([3.0, 5.0]), kl, [])
    loss, _ = training._loss(evidence, None, 0)
    assert float(loss.detach()) == pytest.approx(4 + 2 * (0.1 + 0.15 + 0.1 + 0.6))
    loss.backward()
    assert kl.grad.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]


# ---------------------------------------------------------------- messages


def test_a_checkpoint_of_other_settings_is_rejected(tmp_path):
    task = tiny_task(tmp_path)
    with pytest.raises(Killed):
        killed_in_its_second_epoch(GeneratorTraining(task)).run(resume=False)
    other = dataclasses.replace(tiny_task(tmp_path, epochs=3), folder=task.folder)
    with pytest.raises(UserError, match=r"checkpoint_latest.pth was made with other settings.*delete this file"):
        GeneratorTraining(other).run(resume=True)


def test_resumption_is_logged(tmp_path):
    lines: list[str] = []
    task = tiny_task(tmp_path, log=lines.append)
    with pytest.raises(Killed):
        killed_in_its_second_epoch(GeneratorTraining(task)).run(resume=True)
    GeneratorTraining(task).run(resume=True)
    assert any(line.startswith("Generator training resumes after epoch 0 (") for line in lines)


def test_fewer_images_than_processes_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"9 processes share the 5 images.*raise generator\.images_per_step"):
        GeneratorTraining(dataclasses.replace(tiny_task(tmp_path), ranks=_Pretended(8, 9)))


class _Pretended(Ranks):
    """One of many processes, alone."""

    def broadcast_parameters(self, model):
        pass


def test_the_real_pictures_are_drawn(tmp_path, monkeypatch):
    from nnunet_cfcl.counterfactual.generator import progress as generator_progress

    for name in ("plot_generator_progress", "draw_samples"):
        monkeypatch.setattr(generator_training, name, getattr(generator_progress, name))
    trained(tiny_task(tmp_path, epochs=1, iterations_per_epoch=1))
    for name in ("progress.png", "samples_epoch_0001.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_validation_pictures_and_checkpoints_are_watched_too(tmp_path, monkeypatch):
    names = {"draw_patches", "plot_generator_progress", "draw_samples", "save_generator"}
    noted = noted_work(generator_training, names, monkeypatch)
    saved = noted_work(epochs, {"save_checkpoint"}, monkeypatch)
    trained(tiny_task(tmp_path))
    assert noted == {(name, True) for name in names} and saved == {("save_checkpoint", True)}
