"""Checkpoints: whole or not at all, on the CPU."""

import pytest
import torch

from nnunet_cfcl.pretraining.checkpoint import load_checkpoint, replace_atomically, save_checkpoint, to_cpu


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.pth"
    save_checkpoint({"x": torch.ones(2)}, file)

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_atomically(file, fail)
    assert load_checkpoint(file)["x"].tolist() == [1, 1]


def test_nothing_is_replaced_where_nothing_was_written(tmp_path):
    replace_atomically(tmp_path / "a", lambda temporary: None)
    assert not list(tmp_path.iterdir())


def test_no_temporary_file_stays_behind(tmp_path):
    save_checkpoint({"x": 1}, tmp_path / "a.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_nested_tensors_are_detached():
    nested = {"a": [torch.ones(1, requires_grad=True)], "b": (torch.ones(1), 3)}
    found = to_cpu(nested)
    assert not found["a"][0].requires_grad and found["b"][1] == 3
