"""A frozen body against an optimiser of the segmentation layers alone."""

import copy

import torch
from torch import nn

from nnunet_cfcl.nnunet.frozen_body import freeze_body


class Network(nn.Module):
    """A network with the parameter names of nnU-Net's U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 5)
        self.decoder = nn.ModuleDict({"stages": nn.Linear(5, 5), "seg_layers": nn.ModuleList([nn.Linear(5, 2)])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder["seg_layers"][0](torch.tanh(self.decoder["stages"](torch.tanh(self.encoder(x)))))


def optimiser_of(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        data = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        network(data).square().mean().backward()
        optimizer.step()


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.named_parameters()}


def test_a_frozen_body_is_bit_identical_and_the_segmentation_layers_learn_as_if_alone():
    torch.manual_seed(0)
    network = Network()
    alone = copy.deepcopy(network)
    before = state(network)
    optimizer = optimiser_of(network.parameters())
    freeze_body(optimizer, network, lambda: True)
    train(network, optimizer, range(5))
    train(alone, optimiser_of(alone.decoder["seg_layers"].parameters()), range(5))
    after, expected = state(network), state(alone)
    for name, value in after.items():
        assert torch.equal(value, expected[name])
        assert torch.equal(value, before[name]) != (".seg_layers." in name)


def test_after_unfreezing_all_parameters_learn_as_without_freezing():
    torch.manual_seed(0)
    network, epoch = Network(), 0
    optimizer = optimiser_of(network.parameters())
    freeze_body(optimizer, network, lambda: epoch < 1)
    train(network, optimizer, range(3))
    plain = copy.deepcopy(network)
    plain_optimizer = optimiser_of(plain.parameters())
    plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    epoch = 1
    train(network, optimizer, range(3, 6))
    train(plain, plain_optimizer, range(3, 6))
    for name, value in state(network).items():
        assert torch.equal(value, state(plain)[name]), name


def test_the_segmentation_layers_of_a_wrapped_network_are_found():
    torch.manual_seed(0)
    network = Network()
    wrapper = nn.Sequential(network)  # names begin with a prefix, as under DDP and torch.compile
    before = state(network)
    optimizer = optimiser_of(wrapper.parameters())
    freeze_body(optimizer, wrapper, lambda: True)
    train(wrapper, optimizer, range(2))
    assert {name for name, value in state(network).items() if not torch.equal(value, before[name])} == {
        "decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
