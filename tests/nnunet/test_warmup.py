"""The warm-up against nnU-Net's own polynomial schedule."""

import copy
import pickle

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_cfcl.nnunet.warmup import WarmUp

RATE = 0.01


def schedules(epochs: int, fraction: float) -> tuple[WarmUp, torch.optim.Optimizer]:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=RATE)
    return WarmUp(PolyLRScheduler(optimizer, RATE, epochs), optimizer, epochs, fraction), optimizer


def rates(epochs: int, fraction: float) -> list[float]:
    """The rate of every epoch, the same in both parameter groups."""
    warm_up, optimizer = schedules(epochs, fraction)
    found = []
    for epoch in range(epochs):
        warm_up.step(epoch)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
    return found


def polynomial(epoch: int, epochs: int) -> float:
    return RATE * (1 - epoch / epochs) ** 0.9


@pytest.mark.parametrize(
    ("epochs", "fraction", "length"),
    [(20, 0.25, 5), (20, 0.05, 1), (21, 0.05, 2), (1000, 0.05, 50), (2, 0.05, 1), (1, 0.05, 1), (4, 1.0, 4)],
)
def test_the_first_epochs_rise_linearly_and_the_rest_is_nnunets_own(epochs, fraction, length):
    expected = [polynomial(n, epochs) * min(1, (n + 1) / (length + 1)) for n in range(epochs)]
    assert rates(epochs, fraction) == pytest.approx(expected, rel=1e-12)


def test_the_epoch_after_the_warm_up_is_the_first_at_the_full_rate():
    found = rates(20, 0.25)
    shares = [rate / polynomial(epoch, 20) for epoch, rate in enumerate(found)]
    assert shares[4] == pytest.approx(5 / 6) and shares[5:] == pytest.approx([1.0] * 15)


def test_no_warm_up_leaves_the_schedule_as_it_is():
    assert rates(6, 0.0) == pytest.approx([polynomial(n, 6) for n in range(6)], rel=1e-12)


def test_setting_an_epoch_again_gives_the_same_rate_as_when_resuming():
    warm_up, optimizer = schedules(20, 0.25)
    for epoch in (0, 1, 1, 2, 2):
        warm_up.step(epoch)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(polynomial(2, 20) * 3 / 6)


def test_all_other_attributes_are_the_wrapped_schedules():
    warm_up, optimizer = schedules(20, 0.25)
    assert warm_up.max_steps == 20 and warm_up.optimizer is optimizer
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = warm_up.no_such_thing


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda warm_up: pickle.loads(pickle.dumps(warm_up))])
def test_a_copy_steps_like_the_original(duplicate):
    warm_up, _ = schedules(20, 0.25)
    copied = duplicate(warm_up)
    copied.step(1)
    assert copied.optimizer.param_groups[0]["lr"] == pytest.approx(polynomial(1, 20) * 2 / 6)
