"""The fine-tuning's epochs are watched, what nnU-Net does before and after them is not."""

from types import SimpleNamespace

import pytest

from nnunet_cfcl.trainers.finetuning import FineTuning
from tests.runs.watching import is_watched, noted_beats


class Stock:
    """nnU-Net's order of calls; notes which of them are watched."""

    def run_training(self):
        self.note("start")
        for self.current_epoch in range(2):
            self.on_epoch_start()
            self.train_step({})
            self.validation_step({})
            self.on_epoch_end()
        self.note("end")

    def note(self, name):
        self.noted.append((name, is_watched()))

    def on_epoch_start(self):
        self.note("epoch")

    def train_step(self, batch):
        return {"loss": 1}

    def validation_step(self, batch):
        if self.fails:
            raise ZeroDivisionError
        return {"loss": 2}

    def on_epoch_end(self):
        self.note("checkpoint")


class Watched(FineTuning, Stock):
    def __init__(self, fails):
        self.fails, self.noted, self.settings = fails, [], SimpleNamespace(
            seed=0, teacher=SimpleNamespace(enabled=False))
        self.local_rank, self._holds_checkpoint, self._watch, self._teacher = 0, True, None, None

    def print_to_log_file(self, line):
        pass


def test_epochs_with_their_checkpoints_are_watched_and_nothing_else_is():
    trainer = Watched(fails=False)
    trainer.run_training()
    epoch = [("epoch", True), ("checkpoint", True)]
    assert trainer.noted == [("start", False), *epoch, *epoch, ("end", False)]


def test_every_step_is_progress(monkeypatch):
    beats = noted_beats(monkeypatch)
    Watched(fails=False).run_training()
    begins, steps = 2, 4
    assert len(beats) == begins + steps


def test_an_epoch_that_is_begun_by_hand_is_not_watched():
    trainer = Watched(fails=False)
    trainer.current_epoch = 0
    trainer.on_epoch_start()
    trainer.on_epoch_end()
    assert trainer.noted == [("epoch", False), ("checkpoint", False)] and not is_watched()


def test_after_an_error_nothing_is_watched_any_more():
    with pytest.raises(ZeroDivisionError):
        Watched(fails=True).run_training()
    assert not is_watched()
