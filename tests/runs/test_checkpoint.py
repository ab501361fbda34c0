"""Checkpoints: written atomically, loaded on the CPU."""

import pytest
import torch
from torch import nn

from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor
from nnunet_cfcl.chromap.nnunet.session import ChromapRequest
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.checkpoint import check_checkpoint, load_body, load_checkpoint, save_checkpoint, to_cpu
from nnunet_cfcl.trainers.finetuning import FineTuning


def test_nested_tensors_are_detached():
    nested = {"a": [torch.ones(1, requires_grad=True)], "b": (torch.ones(1), 3)}
    found = to_cpu(nested)
    assert not found["a"][0].requires_grad and found["b"][1] == 3


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    save_checkpoint({"x": torch.arange(3), "epoch": 4}, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth")
    assert found["x"].tolist() == [0, 1, 2] and found["epoch"] == 4


@pytest.fixture
def damaged(tmp_path):
    """nnU-Net's own checkpoint, with a bit flipped in a weight; `torch.load` takes it for good."""
    file = tmp_path / "fold_0" / "checkpoint_final.pth"
    file.parent.mkdir()
    torch.save({"network_weights": {"a": torch.full((1000,), 1000.0)}, "init_args": {}}, file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.tensor([1000.0]).numpy().tobytes()) + 3] ^= 64
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["network_weights"]["a"][0] != 1000
    return file


def test_nnunets_own_checkpoint_is_looked_at_before_it_is_continued(damaged):
    with pytest.raises(UserError, match=r"checkpoint_final\.pth is damaged .*checksum.*--c goes on from"):
        FineTuning.load_checkpoint(FineTuning.__new__(FineTuning), str(damaged))


@pytest.mark.parametrize("folds", [None, (0,), 0, "0"])
def test_nnunets_own_checkpoint_is_looked_at_before_maps_are_drawn_with_it(damaged, folds):
    predictor = ChromapPredictor(ChromapRequest())
    with pytest.raises(UserError, match=r"fold_0.checkpoint_final\.pth is damaged .*checksum"):
        predictor.initialize_from_trained_model_folder(str(damaged.parents[1]), folds)


def test_a_checkpoint_that_is_cut_short_or_missing_is_named(tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    save_checkpoint({"x": torch.arange(3)}, file)
    check_checkpoint(file, "mend it")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint_final\.pth is damaged .*; mend it"):
        check_checkpoint(file, "mend it")
    file.unlink()
    with pytest.raises(UserError, match=r"there is no checkpoint .*checkpoint_final\.pth; mend it"):
        check_checkpoint(file, "mend it")


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


def test_weights_that_lack_a_part_of_the_network_are_rejected():
    weights = {key: value for key, value in _network(3).state_dict().items() if "conv.bias" not in key}
    with pytest.raises(RuntimeError, match="conv.bias"):
        load_body(_network(3), weights)
