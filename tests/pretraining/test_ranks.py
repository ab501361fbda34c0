"""Several processes (gloo, on the CPU) do together what one does: gradients, statistics, weights, files."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource, OriginalSource
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.decoder_tap import plain_network
from nnunet_cfcl.nnunet.segmentation_loss import NnUNetLoss
from nnunet_cfcl.pretraining import loop, methods
from nnunet_cfcl.pretraining.loop import Pretraining, PretrainingTask
from nnunet_cfcl.pretraining.methods import Method, MethodContext
from nnunet_cfcl.runs import ranks as ranks_module
from nnunet_cfcl.runs.checkpoint import load_checkpoint
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.views import ViewGeometry
from tests.conftest import CasesInMemory
from tests.pretraining.conftest import TINY, tiny_network
from tests.runs.crew import Crew, join

METHODS = {method.name: method for method in vars(methods).values() if isinstance(method, Method)}
LEARNED = {"pretrain": {"learn_temperature": True}}
FOUR_IMAGES = {"pretrain": {"images_per_step": 4}}
VIEWS = TINY["counterfactual"]["count"] + 1


@pytest.fixture(scope="module")
def crews(tmp_path_factory):
    made: dict[int, Crew] = {}

    def crew(count: int) -> Crew:
        if count not in made:
            made[count] = Crew(count, tmp_path_factory.mktemp("crew"))
        return made[count]

    yield crew
    for one in made.values():
        one.close()


def nnunet_loss() -> NnUNetLoss:
    """As in a 2d plan of nnU-Net: the Dice is pooled over what it is given."""
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return NnUNetLoss(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss), None, None)


def cases() -> CasesInMemory:
    """Six smooth images; four have labels, one of them with little confidence."""
    random, shape = np.random.default_rng(0), (1, 40, 44)
    images = {f"case_{n}": random.normal(size=(1, *shape)).cumsum(-1).cumsum(-2) / 20 for n in range(6)}
    rows = np.arange(40)[None, :, None] // 14 * np.ones(shape, int)
    maps = {f"case_{n}": np.stack([rows, np.full(shape, 30 if n == 1 else 100)]) for n in range(4)}
    return CasesInMemory(images, maps)


def make_task(method: str, folder: Path, ranks: Ranks, settings: dict[str, Any], patches: int) -> PretrainingTask:
    merged = {key: {**TINY.get(key, {}), **settings.get(key, {})} for key in {*TINY, *settings}}
    resolved, reader, geometry = resolve_settings(merged), cases(), ViewGeometry((24, 28), (1.0, 1.0))
    chosen = METHODS[method]
    source = AcquisitionSource(reader, resolved.acquisition, ["ZScoreNormalization"], 2)
    return PretrainingTask(
        reader=reader, source=source if chosen.counterfactuals else OriginalSource(),
        objective=chosen.build(MethodContext(resolved, geometry, 1, None, nnunet_loss)),
        geometry=geometry, settings=resolved, patches_per_pass=patches, device=torch.device("cpu"), workers=0,
        folder=folder, identity={"settings": resolved.to_dict()}, log=print, ranks=ranks,
    )


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(double(part) for part in value) if isinstance(value, (list, tuple)) else value


def pretraining_of(task: PretrainingTask) -> Pretraining:
    """In float64, where rounding hides no mistake."""
    network = tiny_network()
    pretraining = Pretraining(network, network, 6, task)
    pretraining.model.double()
    pretraining._encode = lambda batch, rows: pretraining.model(
        pretraining.render(batch, rows).double(), double(pretraining.objective.inputs(batch, rows, task.device))
    )
    return pretraining


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()


def first_gradients(ranks: Ranks, method: str, settings: dict[str, Any], patches: int) -> tuple[Any, ...]:
    """Which parameters were reached, their gradients after the first step's backward pass, its statistics."""
    pretraining = pretraining_of(make_task(method, Path(), ranks, settings, patches))
    statistics = pretraining.backward(next(pretraining.batches(0)))
    ranks.sum_gradients(pretraining.parameters, pretraining.model.loss_parameters())
    reached = [p.grad is not None for p in pretraining.parameters]
    return reached, flat(p.grad for p in pretraining.parameters if p.grad is not None), statistics


def assert_same_gradients(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert found[0] == expected[0]
    assert np.abs(expected[1]).max() > 1e-5
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9, atol=1e-11 * np.abs(expected[1]).max())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_and_statistics_of_two_processes_are_those_of_one(crews, method):
    """Three images: one in the first process, two in the second, which takes two passes."""
    expected = first_gradients(Ranks(), method, {}, VIEWS)
    first, second = crews(2)(first_gradients, method, {}, VIEWS)
    for found in (first, second):
        assert_same_gradients(found, expected)
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2].keys() == expected[2].keys()
    assert first[2] == second[2]
    assert first[2] == pytest.approx(expected[2], rel=1e-6)  # losses that are added up are added in float32


@pytest.mark.parametrize("method", ["DVD-CL", "MVD-CL", "S-DVD-CL", "S-MVD-CL", "SimCLR"])
def test_a_learned_temperature_has_the_gradient_of_one_process(crews, method):
    expected = first_gradients(Ranks(), method, LEARNED, VIEWS)
    for found in crews(2)(first_gradients, method, LEARNED, VIEWS):
        assert len(found[0]) == 1 + len(first_gradients(Ranks(), method, {}, 100)[0])
        assert_same_gradients(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_three_processes_share_four_images(crews, method):
    """Every process in one pass, one process alone in four."""
    expected = first_gradients(Ranks(), method, FOUR_IMAGES, VIEWS)
    for found in crews(3)(first_gradients, method, FOUR_IMAGES, 2 * VIEWS):
        assert_same_gradients(found, expected)


def test_gathered_parts_of_any_type_are_in_the_order_of_the_images(crews):
    whole = {
        "bool": torch.tensor([[True, False], [False, False], [True, True]]), "int16": torch.arange(3).short(),
        "float": torch.rand(3, 2, 5), "long": torch.arange(6).view(3, 2) * 10**12, "half": torch.rand(3, 1).half(),
    }
    for found in crews(2)(gather_parts, {key: value.numpy() for key, value in whole.items()}):
        assert all(np.array_equal(found[key], value.numpy()) for key, value in whole.items())


def gather_parts(ranks: Ranks, whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    images = ranks.images(3)
    return {key: ranks.gather(torch.from_numpy(value[images.start : images.stop]), 3).numpy()
            for key, value in whole.items()}


def test_a_parameter_without_a_gradient_anywhere_keeps_none_and_one_with_it_somewhere_gets_the_sum(crews):
    for here in crews(2)(sum_some):
        assert here == [None, [3.0, 3.0], [5.0]]


def sum_some(ranks: Ranks) -> list[list[float] | None]:
    nowhere, somewhere, complete = (nn.Parameter(torch.zeros(length)) for length in (3, 2, 1))
    if ranks.rank == 1:
        somewhere.grad = torch.full((2,), 3.0)
    complete.grad = torch.full((1,), 5.0)
    ranks.sum_gradients([nowhere, somewhere, complete], [complete])
    return [None if p.grad is None else p.grad.tolist() for p in (nowhere, somewhere, complete)]


def test_all_ranks_take_the_parameters_and_buffers_of_the_main_rank(crews):
    (before, after), (other, taken) = crews(2)(take_weights)
    assert not np.array_equal(before, other)
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(taken, before)


def take_weights(ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for value in model.state_dict().values():
        value.fill_(1 + ranks.rank)
    before = flat(model.state_dict().values())
    ranks.broadcast_parameters(model)
    return before, flat(model.state_dict().values())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_processes_divide_the_images_among_themselves(count):
    parts = [list(Ranks(rank, count).images(7)) for rank in range(count)]
    assert sum(parts, []) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_fewer_images_than_processes_are_rejected(crews):
    with pytest.raises(UserError, match=r"4 processes share the 3 images.*at most 3.*pretrain.images_per_step"):
        Ranks(3, 4).images(3)
    too_few = {"pretrain": {"images_per_step": 1}}
    assert all("use at most 1 processes" in message for message in crews(2)(rejection, too_few))


def rejection(ranks: Ranks, settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        pretraining_of(make_task("DVD-CL", Path(), ranks, settings, 4))
    return str(error.value)


def read_images(ranks: Ranks) -> list[np.ndarray]:
    pretraining = pretraining_of(make_task("DVD-CL", Path(), ranks, {}, 4))
    stream = pretraining.batches(0)
    return [next(stream)["image"].numpy() for _ in range(4)]


def test_every_process_reads_other_images_and_together_those_of_one(crews):
    expected, parts = read_images(Ranks()), crews(2)(read_images)
    for step in range(4):
        assert [len(part[step]) for part in parts] == [1, 2]
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), expected[step])
        assert len(np.unique(expected[step].reshape(3, -1), axis=0)) == 3


class Killed(Exception):
    """Stands in for a lost machine."""


def train(ranks: Ranks, method: str, folder: Path, killed: bool = False, resume: bool = False) -> dict[str, Any]:
    """A tiny run in a folder of this rank's own; ``killed`` ends it after its first epoch."""
    pretraining = pretraining_of(make_task(method, folder / f"rank_{ranks.rank}", ranks, {}, VIEWS))
    if killed:
        pretraining._steps = only_first(pretraining._steps)
    # what takes longest are the pictures
    with patch.object(loop, "plot_views", draw_views), patch.object(loop, "plot_progress", draw), suppress(Killed):
        pretraining.run(resume)
    return {key: value.numpy() for key, value in pretraining.model.state_dict().items()}


def draw_views(batch: Any, views: Tensor, file: Path, others: str) -> None:
    file.touch()


def draw(epochs: Any, file: Path) -> None:
    file.touch()


def only_first(steps: Any) -> Any:
    def run(number: int, data: Any, beat: Any) -> Any:
        if number == 1:
            raise Killed
        return steps(number, data, beat)

    return run


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("method", ["DVD-CL", "S-MVD-CL", "PixPro", "MAE"])
def test_a_run_of_two_processes_ends_with_the_weights_of_one_and_the_first_writes_the_files(crews, tmp_path, method):
    expected = train(Ranks(), method, tmp_path / "one")
    first, second = crews(2)(train, method, tmp_path / "two")
    assert_same_weights(first, expected, 1e-7)
    assert_same_weights(second, first, 0)
    assert_only_the_first_wrote(tmp_path / "two")


def assert_only_the_first_wrote(folder: Path) -> None:
    assert [file.name for file in folder.iterdir()] == ["rank_0"]
    files = {file.name for file in (folder / "rank_0").iterdir()}
    assert files == {"checkpoint_final.pth", "log.jsonl", "progress.png", "views.png"}
    lines = (folder / "rank_0/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


@pytest.mark.parametrize("method", ["DVD-CL", "PixPro"])
def test_a_resumed_run_restores_every_process_from_the_first_ones_file(crews, tmp_path, method):
    whole = crews(2)(train, method, tmp_path / "whole")
    crews(2)(train, method, tmp_path / "cut", True)
    assert load_checkpoint(tmp_path / "cut/rank_0/checkpoint_latest.pth")["epoch"] == 1
    resumed = crews(2)(train, method, tmp_path / "cut", False, True)
    for found, expected in zip(resumed, whole, strict=True):
        assert_same_weights(found, expected, 0)


def test_a_run_begun_by_one_process_is_finished_by_two(crews, tmp_path):
    whole = train(Ranks(), "DVD-CL", tmp_path / "whole")
    train(Ranks(), "DVD-CL", tmp_path / "cut", killed=True)
    for found in crews(2)(train, "DVD-CL", tmp_path / "cut", False, True):
        assert_same_weights(found, whole, 1e-7)


def test_the_main_rank_works_before_the_others_and_its_error_is_raised_on_all(crews, tmp_path):
    assert crews(2)(write_in_turn, tmp_path / "order") == ["first", "not first"]
    assert crews(2)(fail_in_turn, 0) == ["rank 0 complains"] * 2
    assert crews(2)(fail_in_turn, 1) == ["done", "rank 1 complains"]


def write_in_turn(ranks: Ranks, file: Path) -> str:
    def work() -> str:
        if file.exists():
            return "not first"
        time.sleep(0.3)
        file.touch()
        return "first"

    return ranks.main_first(work)


def fail_in_turn(ranks: Ranks, failing: int) -> str:
    def work() -> str:
        if ranks.rank == failing:
            raise UserError(f"rank {failing} complains")
        return "done"

    try:
        return ranks.main_first(work)
    except UserError as error:
        return str(error)


def behind_the_wrapper(ranks: Ranks) -> dict[str, Any]:
    """Both phases under the wrapper that ``nnUNetv2_train -num_gpus 2`` puts around the network."""
    torch.manual_seed(ranks.rank)
    network = DistributedDataParallel(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)))
    part = plain_network(network)[0]  # phase 1 leaves the segmentation layer alone
    task = make_task("DVD-CL", Path(), ranks, {"pretrain": {"projection_dim": 4}}, VIEWS)
    pretraining = Pretraining(network.module, part, 4, task)
    data = pretraining.batches(0)
    for number in range(3):
        pretraining.step(next(data), number)
    pretrained = flat(network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(ranks.rank))
        network(images).square().mean().backward()
        gradients = flat(p.grad for p in network.parameters())
        local = flat(torch.autograd.grad(network.module(images).square().mean(), list(network.parameters())))
        optimizer.step()
    return {"pretrained": pretrained, "gradients": gradients, "local": local, "finetuned": flat(network.parameters())}


def test_phase_1_goes_past_ddp_and_phase_2_goes_through_it(crews):
    one, two = crews(2)(behind_the_wrapper)
    for key in ("pretrained", "gradients", "finetuned"):
        np.testing.assert_array_equal(one[key], two[key])
    assert not np.allclose(one["local"], two["local"])
    np.testing.assert_allclose(one["gradients"], (one["local"] + two["local"]) / 2, rtol=1e-5, atol=1e-7)


def lose_rank_1(rank: int, store: str, how: str) -> None:
    """Rank 1 meets a broken image, or is killed, while rank 0 waits for its gradients."""
    join(rank, 2, store)
    task = make_task("DVD-CL", Path(), Ranks.current(), {}, VIEWS)
    if rank == 1 and how == "image":
        for case in task.reader.cases:
            task.reader.arrays[case][:] = np.nan
    pretraining = pretraining_of(dataclasses.replace(task, checkpoints=False))
    data = pretraining.batches(0)
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    pretraining.step(next(data), 0)


@pytest.mark.parametrize("how, message", [("image", r"Process 1.*UserError: case 'case_\d'"), ("kill", "SIGKILL")])
def test_a_process_that_fails_ends_the_others_and_is_named(tmp_path, how, message):
    """Started as by nnU-Net (torch.multiprocessing), apart from the start method."""
    started = time.monotonic()
    with pytest.raises((mp.ProcessRaisedException, mp.ProcessExitedException), match=rf"(?si){message}"):
        mp.start_processes(lose_rank_1, (str(tmp_path / "store"), how), nprocs=2, start_method="forkserver")
    assert time.monotonic() - started < 60


def test_the_first_process_works_alone_and_all_get_its_result_or_its_error(crews):
    assert crews(2)(let_the_first_work, "good") == [("good", [0]), ("good", [])]
    assert all("bad" in found for found in crews(2)(let_the_first_work, "bad"))
    assert Ranks().main_only(lambda: 3) == 3


def let_the_first_work(ranks: Ranks, word: str) -> Any:
    ranks_module.SECONDS_BETWEEN_QUESTIONS = 0.01
    worked: list[int] = []

    def work() -> str:
        worked.append(ranks.rank)
        time.sleep(0.1)
        if word == "bad":
            raise UserError("this is bad")
        return word

    try:
        return ranks.main_only(work), worked
    except UserError as error:
        return str(error)
