"""Checkpoints: whole or not at all, on the CPU."""

import pytest
import torch
from torch import nn

from nnunet_cfcl.runs.checkpoint import load_body, load_checkpoint, save_checkpoint, to_cpu


def test_nested_tensors_are_detached():
    nested = {"a": [torch.ones(1, requires_grad=True)], "b": (torch.ones(1), 3)}
    found = to_cpu(nested)
    assert not found["a"][0].requires_grad and found["b"][1] == 3


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    save_checkpoint({"x": torch.arange(3), "epoch": 4}, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth")
    assert found["x"].tolist() == [0, 1, 2] and found["epoch"] == 4


def _network(labels: int) -> nn.Module:
    body = nn.Module()
    body.conv = nn.Conv2d(1, 2, 1)
    body.seg_layers = nn.ModuleList([nn.Conv2d(2, labels, 1)])
    return nn.ModuleDict({"decoder": body})


def test_everything_but_the_segmentation_layers_is_loaded_whatever_the_labels():
    source, target = _network(3), _network(5)
    before = target["decoder"].seg_layers[0].weight.clone()
    load_body(target, source.state_dict())
    assert torch.equal(target["decoder"].conv.weight, source["decoder"].conv.weight)
    assert torch.equal(target["decoder"].seg_layers[0].weight, before)


def test_weights_that_lack_a_part_of_the_network_are_refused():
    weights = {key: value for key, value in _network(3).state_dict().items() if "conv.bias" not in key}
    with pytest.raises(RuntimeError, match="conv.bias"):
        load_body(_network(3), weights)
