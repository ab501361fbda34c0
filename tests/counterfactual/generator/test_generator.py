"""A generator: its intensity scale, its changes in the images' own units, and its file."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.generator.generator import (
    Change,
    CounterfactualGenerator,
    IntensityScale,
    computes_in_bfloat16,
)
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_sizes import sizes_from_json
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.checkpoint import save_checkpoint
from tests.counterfactual.random_generator import SHAPES, encoded, random_generator

BEFORE = {"scanner": "A", "disease": "no", "age": "65"}
OTHERS = ({**BEFORE, "scanner": "C"}, {**BEFORE, "disease": "yes"}, {**BEFORE, "scanner": "B", "disease": "yes"})
TWO_CHANNELS = IntensityScale(torch.tensor([100.0, -2.0]), torch.tensor([50.0, 0.25]), torch.tensor([-60.0, -3.0]),
                              torch.tensor([300.0, -1.0]))


def generator_of(dim=2, learned=True):
    """A generator of two channels of very different intensities."""
    made = random_generator(dim, 2, learned)
    return CounterfactualGenerator(made.model, made.coding, TWO_CHANNELS, made.identity)


def images_of(dim=2, count=3, seed=1):
    noise = torch.randn((count, 2, *SHAPES[dim][0]), generator=torch.Generator().manual_seed(seed))
    return TWO_CHANNELS.backward(0.6 * noise)


def parents_of(cells, count=3):
    return encoded(*[cells] * count)


# ---------------------------------------------------------------- intensities


def test_the_scale_matches_the_distribution_of_the_intensities():
    random = torch.Generator().manual_seed(0)
    wanted = torch.tensor([[10.0, 3.0], [-5.0, 0.5]])
    images = [wanted[:, :1, None, None] + wanted[:, 1:, None, None] * torch.randn((2, 8, 32, 32), generator=random)
              for _ in range(6)]
    scale = IntensityScale.of_quantiles([intensity_quantiles(image.numpy()) for image in images])
    torch.testing.assert_close(scale.mean, wanted[:, 0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(scale.std, wanted[:, 1], rtol=0.1, atol=0.02)
    for channel in range(2):
        values = torch.stack([image[channel] for image in images])
        inside = (values >= scale.low[channel]) & (values <= scale.high[channel])
        assert 0.98 < inside.float().mean() < 1
    assert scale.mean.dtype == torch.float32


def test_one_outlying_case_in_two_hundred_does_not_set_the_range():
    tables = [torch.linspace(-2, 2, 9)[None] + 0.01 * (n % 7) for n in range(200)]
    usual = IntensityScale.of_quantiles(tables)
    odd = IntensityScale.of_quantiles([*tables[:-1], torch.linspace(-2, 900, 9)[None]])
    torch.testing.assert_close(odd.high, usual.high)
    torch.testing.assert_close(odd.low, usual.low)


def test_the_scale_of_a_constant_channel_is_finite():
    scale = IntensityScale.of_quantiles([torch.full((1, 9), 4.0)] * 3)
    images = torch.full((1, 1, 4, 4), 4.0)
    assert scale.forward(images).isfinite().all() and torch.equal(scale.backward(scale.forward(images)), images)


@pytest.mark.parametrize("dim", [2, 3])
def test_backward_inverts_forward_and_forward_clips_to_the_range(dim):
    images = images_of(dim)
    seen = TWO_CHANNELS.forward(images.double())
    assert seen.dtype == torch.float32
    for channel in range(2):
        expected = (images[:, channel] - TWO_CHANNELS.mean[channel]) / TWO_CHANNELS.std[channel]
        torch.testing.assert_close(seen[:, channel], expected)
    torch.testing.assert_close(TWO_CHANNELS.backward(seen), images)
    far = torch.tensor([1000.0, -1000.0]).view(1, 2, *[1] * dim).expand_as(images)
    ends = torch.stack([TWO_CHANNELS.high[0], TWO_CHANNELS.low[1]]).view(1, 2, *[1] * dim)
    torch.testing.assert_close(TWO_CHANNELS.backward(TWO_CHANNELS.forward(far)), ends.expand_as(images))


@pytest.mark.parametrize(("original", "counterfactual", "clipped"), [
    (0.0, 50.0, 50.0), (0.0, 400.0, 300.0), (0.0, -400.0, -60.0), (350.0, 400.0, 350.0), (350.0, 320.0, 320.0),
    (350.0, -400.0, -60.0), (-90.0, -400.0, -90.0), (-90.0, -70.0, -70.0)])
def test_a_counterfactual_leaves_the_observed_range_only_where_its_original_does(original, counterfactual, clipped):
    scale = IntensityScale(*(values[:1] for values in (TWO_CHANNELS.mean, TWO_CHANNELS.std, TWO_CHANNELS.low,
                                                       TWO_CHANNELS.high)))
    found = scale.clip(torch.full((1, 1, 2, 2), counterfactual), torch.full((1, 1, 2, 2), original))
    assert (found == clipped).all()


# ---------------------------------------------------------------- interventions


def expected_counterfactual(generator, images, parents, others, noise=None):
    """m* + sigma*/sigma (x - m) in the images' own units, from the model's likelihoods, channel by channel.

    Where the model's input is clipped, the deviation from m is still that of the unclipped image.
   """
    scale_mean, scale_std = generator.scale.mean, generator.scale.std
    codes = generator.model(generator.scale.forward(images), parents, noise).codes
    before, after = generator.model.decode(codes, parents), generator.model.decode(codes, others)
    found = []
    for channel in range(images.shape[1]):
        mean, mean_after = (one.mean[:, channel] * scale_std[channel] + scale_mean[channel] for one in (before, after))
        sigma, sigma_after = (one.log_scale[:, channel].exp() * scale_std[channel] for one in (before, after))
        found.append(mean_after + sigma_after / sigma * (images[:, channel] - mean))
    return torch.stack(found, 1)


def assert_close_in_units(found, expected):
    """Relative to the standard deviation of each channel."""
    for channel, std in enumerate(TWO_CHANNELS.std):
        torch.testing.assert_close(found[:, channel] / std, expected[:, channel] / std, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_change_gives_the_counterfactual_of_the_method_in_the_images_own_units(dim, learned):
    generator, images = generator_of(dim, learned), images_of(dim)
    images[0, 0].flatten()[:3] = torch.tensor([900.0, -700.0, 301.0])  # beyond what the model sees
    parents, others = parents_of(BEFORE), [parents_of(one) for one in OTHERS]
    for noise in (None, generator.model.draw_noise(torch.Generator().manual_seed(2), 3)):
        changes = generator.changes(images, parents, others, noise)
        for change, other in zip(changes, others, strict=True):
            expected = expected_counterfactual(generator, images, parents, other, noise)
            assert_close_in_units(change.apply(images), expected)
            assert (change.gain == 1).all() != learned == generator.learned_scale
            assert change.offset.dtype == change.gain.dtype == torch.float32
            clipped = generator.counterfactuals(images, parents, other, noise)
            assert torch.equal(clipped, generator.scale.clip(change.apply(images), images))
            assert (expected - images).abs().mean() > 1e-3


@pytest.mark.parametrize("learned", [True, False])
def test_changing_nothing_changes_nothing_at_all(learned):
    generator, images, parents = generator_of(2, learned), images_of(), parents_of(BEFORE)
    images[0, 0, 0, :2] = torch.tensor([900.0, -700.0])
    change = generator.changes(images, parents, [parents])[0]
    assert (change.offset == 0).all() and (change.gain == 1).all()
    assert torch.equal(change.apply(images), images)
    assert torch.equal(generator.counterfactuals(images, parents, parents), images)


def test_a_change_is_linear_in_the_image():
    change = Change(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.5]]))
    assert change.apply(torch.tensor([[10.0, 10.0]])).tolist() == [[21.0, 7.0]]


def test_a_reconstruction_is_the_decoders_mean_in_the_images_units():
    generator, images, parents = generator_of(), images_of(), parents_of(BEFORE)
    codes = generator.model(generator.scale.forward(images), parents).codes
    mean = generator.model.decode(codes, parents).mean
    assert torch.equal(generator.reconstruct(images, parents), generator.scale.backward(mean))


def test_no_gradients_are_kept():
    generator, images = generator_of(), images_of().requires_grad_()
    change = generator.changes(images, parents_of(BEFORE), [parents_of(OTHERS[0])])[0]
    assert not change.offset.requires_grad and not change.gain.requires_grad
    assert not generator.model.training and not any(p.requires_grad for p in generator.model.parameters())
    assert generator.patch_size == SHAPES[2][0]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("dim", "learned"), [(2, True), (3, False)])
def test_a_generator_survives_its_file_which_holds_nothing_but_data(tmp_path, dim, learned):
    generator, images, parents, others = (generator_of(dim, learned), images_of(dim), parents_of(BEFORE),
                                          parents_of(OTHERS[2]))
    file = tmp_path / "generator.pth"
    save_checkpoint({"generator": generator.state()}, file)
    torch.load(file, weights_only=True)
    again = CounterfactualGenerator.load(file)
    made = [one.counterfactuals(images, parents, others) for one in (generator, again)]
    assert torch.equal(*made)
    assert again.coding == generator.coding and again.identity == generator.identity
    assert again.model.sizes == generator.model.sizes and again.patch_size == SHAPES[dim][0]


def test_sizes_survive_json():
    sizes = replace(random_generator(3).model.sizes, prior="exogenous", likelihood="discretised", log_scale=-2.5)
    assert sizes_from_json(json.loads(json.dumps(asdict(sizes)))) == sizes
    HVAE(sizes_from_json(json.loads(json.dumps(asdict(sizes)))))


def test_a_missing_generator_is_reported_with_the_command_that_trains_it(tmp_path):
    with pytest.raises(UserError, match=r"no generator .*nothing\.pth; fix: run `nnunet_cfcl generator train`"):
        CounterfactualGenerator.load(tmp_path / "nothing.pth")


def damaged(how, state):
    if how == "another version":
        return {"generator": {**state, "format": 99}}
    if how == "another model":
        return {"generator": {**state, "weights": {**state["weights"], "encoder.stem.bias": torch.zeros(3)}}}
    return {"network_weights": {}}


@pytest.mark.parametrize("how", ["cut short", "text", "another checkpoint", "another version", "another model"])
def test_a_file_that_is_not_a_generator_raises_with_the_fix(tmp_path, how):
    file = tmp_path / "generator.pth"
    state = random_generator().state()
    torch.save(damaged(how, state), file)
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-2000])
    elif how == "text":
        file.write_text("no generator")
    with pytest.raises(UserError, match=r"generator\.pth cannot be read as a generator.*delete it and run") as error:
        CounterfactualGenerator.load(file)
    assert how != "another version" or "format 99, expected 1" in str(error.value)


def test_bfloat16_is_used_where_the_device_has_it(monkeypatch):
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert computes_in_bfloat16(torch.device("cuda")) == fast
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=supported: found, raising=False)
        assert computes_in_bfloat16(torch.device("cpu")) == supported
    assert not computes_in_bfloat16(torch.device("mps"))
