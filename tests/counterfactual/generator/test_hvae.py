"""The HVAE: published size, counterfactuals, and no information leaks between its parts."""

import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnunet_cfcl.counterfactual.generator.gaussians import gaussian_log_density
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_decoder import LOG_SCALE_FLOOR
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution

FLAT = HVAESizes((Resolution((16, 12), 8, 1, 1, 2, stochastic=False), Resolution((8, 12), 12, 1, 2, 3),
                  Resolution((4, 6), 16, 1, 2, 4), Resolution((1, 1), 24, 1, 2, 5)), channels=2, parents=4, dropout=0.0)
DEEP = HVAESizes((Resolution((4, 8, 8), 8, 1, 1, 2), Resolution((4, 4, 4), 12, 1, 2, 3),
                  Resolution((1, 1, 1), 16, 1, 1, 5)), channels=1, parents=4, dropout=0.0, prior="exogenous")
BOTH = pytest.mark.parametrize("sizes", [FLAT, DEEP], ids=["2d", "3d"])


def model_of(sizes, moved=True):
    """A model with random values in place of zero initialisations, so that every part has an effect."""
    torch.manual_seed(0)
    model = HVAE(sizes).eval()
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def images_of(sizes, count=3, seed=1):
    shape = (count, sizes.channels, *sizes.resolutions[0].shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parents_of(sizes, count=3, seed=2):
    return torch.randint(0, 2, (count, sizes.parents), generator=torch.Generator().manual_seed(seed)).float()


def count(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_the_papers_preset_has_the_papers_size():
    with torch.device("meta"):
        model = HVAE.preset("paper")
    assert count(model) == pytest.approx(39.9, rel=0.02)
    assert count(model.encoder) == pytest.approx(11.3, rel=0.02)
    assert count(model.decoder) == pytest.approx(28.6, rel=0.02)
    images = torch.zeros(2, 1, 224, 224, device="meta")
    evidence = model(images, torch.zeros(2, 3, device="meta"))
    assert evidence.likelihood.mean.shape == images.shape
    assert len(model.decoder.code_shapes()) == 55 and model.decoder.code_shapes()[-1] == (12, 56, 56)
    with pytest.raises(ValueError, match="only preset is 'paper'"):
        HVAE.preset("small")


@BOTH
def test_all_outputs_have_the_documented_shapes(sizes):
    model, images, parents = model_of(sizes), images_of(sizes), parents_of(sizes)
    evidence = model(images, parents)
    assert evidence.likelihood.mean.shape == evidence.likelihood.log_scale.shape == images.shape
    assert evidence.nll.shape == (3,) and evidence.kl.shape == (len(sizes.resolutions), 3)
    assert [tuple(code.shape[1:]) for code in evidence.codes] == model.decoder.code_shapes()
    assert [tuple(n.shape[1:]) for n in model.draw_noise(torch.Generator(), 3)] == model.decoder.code_shapes()


@BOTH
def test_the_divergence_is_positive_where_codes_are_stochastic_and_zero_elsewhere(sizes):
    kl = model_of(sizes)(images_of(sizes), parents_of(sizes)).kl
    for row, resolution in zip(kl, sizes.resolutions):
        assert (row > 0).all() if resolution.stochastic else (row == 0).all()


@BOTH
def test_an_untrained_model_begins_with_finite_evidence_and_scale_one(sizes):
    evidence = model_of(sizes, moved=False)(images_of(sizes), parents_of(sizes))
    assert evidence.nll.isfinite().all() and evidence.kl.isfinite().all()
    assert (evidence.likelihood.log_scale.abs() < 1e-3).all()  # the floor adds a little to it


@BOTH
def test_the_evidence_is_the_log_density_of_its_own_likelihood(sizes):
    images = images_of(sizes)
    evidence = model_of(sizes)(images, parents_of(sizes))
    expected = -gaussian_log_density(images, *evidence.likelihood).flatten(1).mean(1)
    torch.testing.assert_close(evidence.nll, expected)


@BOTH
def test_decoding_abducted_codes_is_the_reconstruction(sizes):
    model, images, parents = model_of(sizes), images_of(sizes), parents_of(sizes)
    for noise in (None, model.draw_noise(torch.Generator().manual_seed(3), 3)):
        evidence = model(images, parents, noise)
        again = model.decode(evidence.codes, parents)
        torch.testing.assert_close(again.mean, evidence.likelihood.mean, rtol=0, atol=0)
        torch.testing.assert_close(again.log_scale, evidence.likelihood.log_scale, rtol=0, atol=0)


@BOTH
def test_changing_nothing_changes_nothing_and_changing_the_parents_is_the_difference_of_two_decodings(sizes):
    model, images, parents = model_of(sizes), images_of(sizes), parents_of(sizes)
    offset, gain = model.counterfactual_changes(images, parents, [parents])[0]
    assert (offset == 0).all() and (gain == 1).all()
    others = 1 - parents
    offset, gain = model.counterfactual_changes(images, parents, [others])[0]
    codes = model(images, parents).codes
    before, after = model.decode(codes, parents), model.decode(codes, others)
    residual = (images - before.mean) / before.log_scale.exp()
    expected = after.mean + after.log_scale.exp() * residual
    torch.testing.assert_close(offset + gain * images, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gain, (after.log_scale - before.log_scale).exp())
    assert (offset + (gain - 1) * images).abs().mean() > 1e-3


@BOTH
def test_several_interventions_are_those_of_one_each_and_cost_one_encoding(sizes):
    model, images, parents = model_of(sizes), images_of(sizes), parents_of(sizes)
    noise = model.draw_noise(torch.Generator().manual_seed(9), 3)
    others = [1 - parents, parents, parents.flip(1)]
    alone = [model.counterfactual_changes(images, parents, [one], noise)[0] for one in others]
    encoded, decoded = [], []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    model.decoder.register_forward_hook(lambda *_: decoded.append(1))
    together = model.counterfactual_changes(images, parents, others, noise)
    assert len(encoded) == 1 and len(decoded) == 4
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@BOTH
def test_an_exogenous_prior_gives_the_same_codes_whatever_the_parents_and_a_conditional_one_does_not(sizes):
    for prior in ("exogenous", "conditional"):
        model, parents = model_of(replace(sizes, prior=prior)), parents_of(sizes)
        noise = model.draw_noise(torch.Generator().manual_seed(10), 3)
        codes = [model.decoder(one, noise=noise).codes for one in (parents, 1 - parents)]
        same = [torch.equal(one, other) for one, other in zip(*codes, strict=True)]
        assert all(same) if prior == "exogenous" else not any(same)
        # the decoder is given them either way
        assert not torch.equal(model.sample(parents, noise).mean, model.sample(1 - parents, noise).mean)


@BOTH
def test_images_of_a_batch_do_not_see_each_other(sizes):
    model, images, parents = model_of(sizes), images_of(sizes), parents_of(sizes)
    whole = model(images, parents)
    for n in range(3):
        alone = model(images[n : n + 1], parents[n : n + 1])
        torch.testing.assert_close(alone.nll[0], whole.nll[n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.kl[:, 0], whole.kl[:, n], rtol=1e-4, atol=1e-4)


@BOTH
def test_the_prior_never_sees_the_image(sizes):
    """Given codes carry all of the image; samples of the prior depend on parents and noise alone."""
    model, parents = model_of(sizes), parents_of(sizes)
    noise = model.draw_noise(torch.Generator().manual_seed(4), 3)
    samples = model.sample(parents, noise)
    torch.testing.assert_close(model.sample(parents, noise).mean, samples.mean)
    other = model.sample(parents, model.draw_noise(torch.Generator().manual_seed(5), 3))
    assert (other.mean - samples.mean).abs().mean() > 1e-3
    assert (model.sample(1 - parents, noise).mean - samples.mean).abs().mean() > 1e-3
    images = images_of(sizes).requires_grad_()
    codes = [code.detach() for code in model(images, parents).codes]
    assert torch.autograd.grad(model.decode(codes, parents).mean.sum(), images, allow_unused=True)[0] is None


@BOTH
def test_noise_is_scaled_by_the_posterior_around_its_mean(sizes):
    model, images, parents = model_of(sizes), images_of(sizes), parents_of(sizes)
    noise = model.draw_noise(torch.Generator().manual_seed(6), 3)
    mean = model(images, parents).codes[0]
    plus = model(images, parents, noise).codes[0]
    minus = model(images, parents, [-one for one in noise]).codes[0]
    torch.testing.assert_close((plus + minus) / 2, mean, rtol=1e-4, atol=1e-5)
    scale = (plus - mean) / noise[0]
    assert (scale > 0).all()


@BOTH
def test_every_parameter_is_trained(sizes):
    model = model_of(sizes)
    evidence = model(images_of(sizes), parents_of(sizes), model.draw_noise(torch.Generator().manual_seed(7), 3))
    (evidence.nll.mean() + evidence.kl.sum()).backward()
    # what the last block says to a further prior has nobody to listen
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    last = f"decoder.stages.{len(sizes.resolutions) - 1}.{sizes.resolutions[0].decoder_blocks - 1}.next_prior_state"
    assert idle == [f"{last}.weight", f"{last}.bias"]


def test_gradients_are_those_of_finite_differences():
    sizes = HVAESizes((Resolution((4, 2), 4, 1, 1, 1), Resolution((1, 1), 8, 1, 1, 2)), parents=2, dropout=0.0)
    model = model_of(sizes).double()
    images, parents = images_of(sizes, 2).double(), parents_of(sizes, 2).double()
    noise = [one.double() for one in model.draw_noise(torch.Generator().manual_seed(8), 2)]

    def bound(parents):
        evidence = model.decoder(parents, model.encoder(images), noise)
        return evidence.likelihood.mean.sum(), evidence.likelihood.log_scale.sum(), torch.stack(evidence.kl).sum()

    assert torch.autograd.gradcheck(bound, parents.requires_grad_())


def test_a_fixed_scale_is_used_and_has_no_parameters():
    fixed = replace(FLAT, log_scale=-math.log(20))
    model, images, parents = model_of(fixed), images_of(fixed), parents_of(fixed)
    assert model.decoder.log_scale is None
    assert (model(images, parents).likelihood.log_scale == -math.log(20)).all()
    assert (model.counterfactual_changes(images, parents, [1 - parents])[0][1] == 1).all()


def test_a_learned_scale_never_falls_below_the_grid_of_8_bit_images():
    model, images, parents = model_of(FLAT), images_of(FLAT), parents_of(FLAT)
    model.decoder.log_scale.bias.data.fill_(-50.0)
    log_scale = model(images, parents).likelihood.log_scale
    assert (log_scale >= LOG_SCALE_FLOOR).all() and (log_scale < LOG_SCALE_FLOOR + 0.01).all()


def test_the_discretised_likelihood_takes_its_grid():
    sizes = replace(FLAT, likelihood="discretised", bin_width=0.25, low=-2.0, high=2.0)
    images = (images_of(sizes).clamp(-2, 2) * 4).round() / 4
    nll = model_of(sizes)(images, parents_of(sizes)).nll
    assert (nll > 0).all() and nll.isfinite().all()  # a probability, never above one


@BOTH
def test_a_model_survives_saving(sizes):
    file = io.BytesIO()
    torch.save(model_of(sizes).state_dict(), file)
    file.seek(0)
    again = HVAE(sizes).eval()
    again.load_state_dict(torch.load(file, weights_only=True))
    images, parents = images_of(sizes), parents_of(sizes)
    assert torch.equal(again(images, parents).nll, model_of(sizes)(images, parents).nll)


def test_bf16_gives_nearly_the_same_evidence_in_float32():
    model, images, parents = model_of(FLAT, moved=False), images_of(FLAT), parents_of(FLAT)
    exact = model(images, parents)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, parents)
    assert half.nll.dtype == half.kl.dtype == torch.float32
    torch.testing.assert_close(half.nll, exact.nll, rtol=0.05, atol=0.05)


def test_resolutions_that_do_not_divide_each_other_raise():
    with pytest.raises(ValueError, match=r"multiple of the next coarser one, found \(6, 4\) followed by \(4, 2\)"):
        HVAESizes((Resolution((6, 4), 8, 1, 1, 1), Resolution((4, 2), 8, 1, 1, 1)))


def test_a_few_training_steps_learn_the_effect_of_the_parents():
    """Images whose brightness is their attribute: only the brightness of a counterfactual differs."""
    sizes = HVAESizes((Resolution((8, 8), 8, 1, 1, 1, stochastic=False), Resolution((4, 4), 16, 1, 1, 1),
                       Resolution((1, 1), 16, 1, 1, 2)), parents=1, dropout=0.0, log_scale=-2.0)
    torch.manual_seed(0)
    model = HVAE(sizes)
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        parents = torch.randint(0, 2, (16, 1), generator=generator).float()
        images = torch.randn(16, 1, 8, 1, generator=generator).expand(-1, -1, -1, 8) * 0.3 + parents[..., None, None]
        evidence = model(images, parents, model.draw_noise(generator, 16))
        loss = evidence.nll.mean() + evidence.kl.sum(0).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        difference, _ = model.counterfactual_changes(images, parents, [1 - parents])[0]
    true = (1 - 2 * parents)[..., None, None]
    assert float((difference - true).abs().mean()) < 0.3
