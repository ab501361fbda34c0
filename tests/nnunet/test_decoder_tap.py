"""The tap against a forward hook, on nnU-Net's two architectures in 2D and 3D."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.decoder_tap import decoder_width, last_decoder_map, plain_network, tapped

SIZES = {2: (16, 24), 3: (8, 16, 12)}
WIDTHS, CLASSES = (5, 6, 7), 3


def build(architecture: type[nn.Module], dim: int, deep_supervision: bool) -> nn.Module:
    """Three stages of different widths, in 3D with an anisotropic first stride."""
    torch.manual_seed(dim)
    depth = {"n_conv_per_stage": 1} if architecture is PlainConvUNet else {"n_blocks_per_stage": 1}
    strides = [1, 2, 2] if dim == 2 else [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    return architecture(
        1, 3, WIDTHS, nn.Conv2d if dim == 2 else nn.Conv3d, 3, strides, num_classes=CLASSES,
        n_conv_per_stage_decoder=1, conv_bias=True, norm_op=nn.InstanceNorm2d if dim == 2 else nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=deep_supervision, **depth)


@pytest.fixture(params=[(architecture, dim, supervised) for architecture in (PlainConvUNet, ResidualEncoderUNet)
                        for dim in (2, 3) for supervised in (True, False)],
                ids=lambda p: f"{p[0].__name__}-{p[1]}D-{'deep' if p[2] else 'single'}")
def network(request) -> nn.Module:
    return build(*request.param)


@pytest.fixture
def images(network) -> torch.Tensor:
    dim = 2 if isinstance(network.decoder.seg_layers[-1], nn.Conv2d) else 3
    return torch.randn(2, 1, *SIZES[dim], generator=torch.Generator().manual_seed(0))


def logits_of(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        output = network(images)
    return output if isinstance(output, list) else [output]


def hooked_map(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The input of the last segmentation layer in an ordinary forward pass."""
    seen: list[torch.Tensor] = []
    handle = network.decoder.seg_layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits_of(network, images)
    handle.remove()
    (features,) = seen
    return features


def test_within_the_block_the_output_is_the_input_of_the_last_segmentation_layer(network, images):
    expected = hooked_map(network, images)
    with last_decoder_map(network) as tapped, torch.no_grad():
        features = tapped(images)
    assert isinstance(features, torch.Tensor) and torch.equal(features, expected)
    assert features.shape == (2, decoder_width(network), *images.shape[2:])
    assert decoder_width(network) == WIDTHS[0]


def test_afterwards_logits_deep_supervision_and_state_dict_are_as_before(network, images):
    before, logits = dict(network.state_dict()), logits_of(network, images)
    supervised = network.decoder.deep_supervision
    with last_decoder_map(network) as tapped:
        within = list(tapped.state_dict())
        assert not tapped.decoder.deep_supervision
    after = network.state_dict()
    lacking = [key for key in before if key not in within]
    assert len(lacking) == 2 and all(key.startswith("decoder.seg_layers.1.") for key in lacking)
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert network.decoder.deep_supervision is supervised
    again = logits_of(network, images)
    assert len(again) == len(logits) == (2 if supervised else 1)
    assert all(torch.equal(a, b) for a, b in zip(again, logits, strict=True))
    assert again[0].shape == (2, CLASSES, *images.shape[2:])


def test_an_exception_within_the_block_restores_the_network(network, images):
    layer, supervised, logits = network.decoder.seg_layers[-1], network.decoder.deep_supervision, logits_of(network,
                                                                                                            images)
    with pytest.raises(KeyboardInterrupt), last_decoder_map(network):
        raise KeyboardInterrupt
    assert network.decoder.seg_layers[-1] is layer and network.decoder.deep_supervision is supervised
    assert all(torch.equal(a, b) for a, b in zip(logits_of(network, images), logits, strict=True))


def test_training_within_the_block_changes_the_network_itself_but_no_segmentation_layer(network, images):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with last_decoder_map(network) as tapped:
        tapped(images).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(".seg_layers." in key for key in changed)
    assert {"encoder", "decoder"} == {key.split(".")[0] for key in changed}


def lowest_map(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The last output of the encoder in an ordinary forward pass."""
    seen: list[torch.Tensor] = []
    handle = network.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output[-1]))
    logits_of(network, images)
    handle.remove()
    return seen[0]


def test_the_encoder_tap_returns_the_decoders_input(network, images):
    expected, keys = lowest_map(network, images), list(network.state_dict())
    with tapped(network, "encoder") as part, torch.no_grad():
        found = part.features(images)
        assert part.network is network and list(part.network.state_dict()) == keys
    dim = images.ndim - 2
    shrunk = tuple(n // s for n, s in zip(images.shape[2:], (2, 4, 4)[-dim:], strict=True))
    assert torch.equal(found, expected)
    assert found.shape == (2, part.width, *shrunk) and part.width == WIDTHS[-1]


def test_the_segmentation_tap_is_the_whole_network_with_its_deep_supervision(network, images):
    logits, keys = logits_of(network, images), list(network.state_dict())
    with tapped(network, "segmentation") as part:
        assert part.features is part.network is network and part.width == CLASSES
        assert all(torch.equal(a, b) for a, b in zip(logits_of(part.features, images), logits, strict=True))
    assert list(network.state_dict()) == keys


def test_the_decoder_tap_is_the_last_decoder_map(network, images):
    expected = hooked_map(network, images)
    with tapped(network, "decoder") as part, torch.no_grad():
        assert part.network is network and part.width == WIDTHS[0]
        assert torch.equal(part.features(images), expected)
    assert isinstance(network.decoder.seg_layers[-1], (nn.Conv2d, nn.Conv3d))


@pytest.mark.parametrize("tap, changed_parts", [
    ("encoder", {"encoder"}), ("decoder", {"encoder", "decoder"}), ("segmentation", {"encoder", "decoder"})])
def test_training_a_tapped_part_changes_the_network_itself(network, images, tap, changed_parts):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with tapped(network, tap) as part:
        optimizer = torch.optim.SGD(part.features.parameters(), lr=0.1)
        output = part.features(images)
        sum(out.square().mean() for out in (output if isinstance(output, list) else [output])).backward()
        optimizer.step()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    # nnU-Net's decoder holds the encoder as well
    own = {key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key for key in changed}
    assert {key.split(".")[0] for key in own} == changed_parts
    assert any(".seg_layers." in key for key in changed) is (tap == "segmentation")


def test_taps_reach_beneath_a_compiled_network():
    network = build(ResidualEncoderUNet, 2, True)
    compiled = torch.compile(network, backend="eager")
    for tap in ("encoder", "decoder", "segmentation"):
        with tapped(compiled, tap) as part:
            assert part.network is network
            assert {id(p) for p in part.features.parameters()} <= {id(p) for p in network.parameters()}


def test_a_compiled_network_is_tapped_beneath_its_wrapper():
    network = build(PlainConvUNet, 2, True)
    compiled = torch.compile(network, backend="eager")
    layer = network.decoder.seg_layers[-1]
    assert plain_network(compiled) is network and decoder_width(compiled) == WIDTHS[0]
    with last_decoder_map(compiled) as tapped:
        assert tapped is network and isinstance(network.decoder.seg_layers[-1], nn.Identity)
    assert network.decoder.seg_layers[-1] is layer and network.decoder.deep_supervision is True


def test_a_network_without_an_nnunet_decoder_is_a_readable_error():
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    message = r"Sequential has no decoder of nnU-Net's U-Net kind \(decoder\.seg_layers\).*PlainConvUNet"
    with pytest.raises(UserError, match=message):
        decoder_width(network)
    with pytest.raises(UserError, match=message), last_decoder_map(network):
        pass
    network.decoder = nn.Module()
    with pytest.raises(UserError, match=message):
        decoder_width(network)
