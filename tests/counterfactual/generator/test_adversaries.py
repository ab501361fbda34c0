"""The adversaries' inputs, updates and losses against slow loops."""

import math

import pytest
import torch
from torch import nn

from nnunet_cfcl.counterfactual.generator.adversaries import Adversaries
from nnunet_cfcl.counterfactual.generator.code_adversary import (
    CodeAdversary,
    adversarial_cross_entropy,
    base_rates,
    value_targets,
)
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.image_adversary import ImageAdversary
from nnunet_cfcl.data.attributes import Attribute
from tests.counterfactual.random_generator import CODING, DISEASE, SCANNER, encoded, random_generator

CHANGED = (SCANNER, DISEASE)
COUNTS = [3, 2]
CASES = [{"scanner": "A", "disease": "no", "age": "50"}, {"scanner": "C", "disease": "yes"}, {"disease": "yes"},
         {"scanner": "B", "disease": "NA", "age": "70"}, {}, {"scanner": "C", "disease": "no"}]
TRUE = [(0, 0), (2, 1), (None, 1), (1, None), (None, None), (2, 0)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- targets


def test_targets_are_one_at_the_value_and_zero_where_it_is_unknown():
    targets = value_targets(encoded(*CASES), CODING, CHANGED)
    for row, (scanner, disease) in zip(targets, TRUE, strict=True):
        expected = [float(scanner == k) for k in range(3)] + [float(disease == k) for k in range(2)]
        assert row.tolist() == expected


def test_targets_follow_the_order_of_the_given_attributes():
    turned, alone = (value_targets(encoded(*CASES), CODING, order) for order in ((DISEASE, SCANNER), (DISEASE,)))
    both = value_targets(encoded(*CASES), CODING, CHANGED)
    assert torch.equal(turned, torch.cat([both[:, 3:], both[:, :3]], 1)) and torch.equal(alone, both[:, 3:])


def test_base_rates_are_the_shares_of_the_known_values():
    rates = base_rates(value_targets(encoded(*CASES), CODING, CHANGED), COUNTS)
    torch.testing.assert_close(rates, torch.tensor([1 / 4, 1 / 4, 2 / 4, 2 / 4, 2 / 4]))
    assert base_rates(torch.zeros(3, 5), COUNTS).tolist() == [0] * 5  # of nothing


# ---------------------------------------------------------------- cross entropy


def slow_cross_entropy(logits, targets, counts):
    """Loop over attributes, heads, images and positions."""
    parts = []
    for reading in logits:
        first = 0
        for count in counts:
            total, known = 0.0, 0
            for image in range(len(targets)):
                target = targets[image, first : first + count]
                if target.sum() > 0:
                    known += 1
                    places = [-float((target * reading[image, first : first + count, place].log_softmax(0)).sum())
                              for place in range(reading.shape[2])]
                    total += sum(places) / len(places)
            parts.append(total / known if known else 0.0)
            first += count
    return sum(parts) / len(parts)


@pytest.mark.parametrize("seed", range(3))
def test_the_cross_entropy_is_that_of_a_slow_loop_which_leaves_unknown_values_out(seed):
    logits = [random(6, 5, 7, seed=seed), random(6, 5, 1, seed=seed + 10)]
    targets = value_targets(encoded(*CASES), CODING, CHANGED)
    found = float(adversarial_cross_entropy(logits, targets, COUNTS))
    assert found == pytest.approx(slow_cross_entropy(logits, targets, COUNTS), rel=1e-5)
    rates = base_rates(targets, COUNTS).expand(6, -1)
    found = float(adversarial_cross_entropy(logits, rates, COUNTS))
    assert found == pytest.approx(slow_cross_entropy(logits, rates, COUNTS), rel=1e-5)


def test_an_image_without_known_values_does_not_affect_the_loss():
    targets = value_targets(encoded(*CASES), CODING, CHANGED)
    logits = random(6, 5, 4).requires_grad_()
    loss = adversarial_cross_entropy([logits], targets, COUNTS)
    loss.backward()
    assert (logits.grad[4] == 0).all() and (logits.grad[2, :3] == 0).all() and (logits.grad[3, 3:] == 0).all()
    assert (logits.grad[0] != 0).all()
    kept = torch.tensor([0, 1, 2, 3, 5])
    torch.testing.assert_close(adversarial_cross_entropy([logits[kept]], targets[kept], COUNTS), loss)


def test_where_nothing_is_known_the_loss_is_zero_and_has_a_graph():
    logits = random(2, 5, 4).requires_grad_()
    loss = adversarial_cross_entropy([logits], torch.zeros(2, 5), COUNTS)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_predicting_the_base_rates_costs_their_entropy_which_is_the_minimum():
    rates = torch.tensor([0.2, 0.3, 0.5, 0.9, 0.1])
    entropy = -sum(p * math.log(p) for p in (0.2, 0.3, 0.5)), -sum(p * math.log(p) for p in (0.9, 0.1))
    guess = rates.log()[None, :, None].expand(4, -1, 3)
    targets = rates.expand(4, -1)
    assert float(adversarial_cross_entropy([guess], targets, COUNTS)) == pytest.approx(sum(entropy) / 2)
    for seed in range(5):
        assert adversarial_cross_entropy([guess + random(4, 5, 3, seed=seed)], targets, COUNTS) > sum(entropy) / 2


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("dim", [2, 3])
def test_the_code_adversary_guesses_at_every_place_of_every_resolution_and_of_the_whole(dim):
    model = random_generator(dim).model
    codes = model.draw_noise(torch.Generator().manual_seed(0), 3)
    adversary = CodeAdversary(model.sizes, CHANGED)
    places = [math.prod(one.shape) for one in model.sizes.resolutions[::-1] if one.stochastic]
    expected = [(3, 5, n) for pair in ((places[0], 1), (places[1], 1)) for n in pair]
    assert [tuple(one.shape) for one in adversary(codes)] == expected


@pytest.mark.parametrize("dim", [2, 3])
def test_predictions_at_a_resolution_depend_on_its_codes_and_on_coarser_codes_only(dim):
    model = random_generator(dim).model
    adversary = CodeAdversary(model.sizes, CHANGED)
    codes = [code.requires_grad_() for code in model.draw_noise(torch.Generator().manual_seed(0), 2)]
    # one code of the single voxel, two of the middle resolution
    for reading, seen in ((0, [True, False, False]), (1, [True, False, False]), (2, [True] * 3), (3, [True] * 3)):
        gradients = torch.autograd.grad(adversary(codes)[reading].square().sum(), codes, allow_unused=True)
        assert [one is not None and bool(one.abs().sum() > 0) for one in gradients] == seen


def test_an_image_of_a_batch_is_judged_by_itself():
    model = random_generator().model
    codes = model.draw_noise(torch.Generator().manual_seed(0), 3)
    images = random(3, 1, 16, 12)
    for network, given in ((CodeAdversary(model.sizes, CHANGED), codes),
                           (ImageAdversary((16, 12), 1, CHANGED).eval(), images)):
        whole = network(given)
        alone = network([code[1:2] for code in given] if isinstance(given, list) else given[1:2])
        for one, other in zip(alone, whole, strict=True):
            torch.testing.assert_close(one[0], other[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [(64, 48), (16, 12), (5, 4), (6, 32, 32), (4, 4, 4)])
def test_the_image_adversary_takes_patches_of_any_size(patch):
    adversary = ImageAdversary(patch, 2, CHANGED)
    local, whole = adversary(random(3, 2, *patch))
    assert local.shape[:2] == whole.shape[:2] == (3, 5) and whole.shape[2] == 1 and local.shape[2] >= 1


def test_the_image_adversary_cannot_grow_steep():
    """The largest singular value of every layer's matrix stays about 1, whatever its weights."""
    adversary = ImageAdversary((32, 32), 1, CHANGED)
    for module in adversary.modules():
        if hasattr(module, "parametrizations"):
            with torch.no_grad():
                module.parametrizations.weight.original.mul_(50)
    for _ in range(30):
        adversary(random(1, 1, 32, 32))
    layers = [module for module in adversary.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]
    assert len(norms) >= 5 and all(norm == pytest.approx(1, abs=0.1) for norm in norms)


# ---------------------------------------------------------------- both


@pytest.fixture
def setting():
    """Adversaries, an HVAE's differentiable outputs for images, and the images' parents."""
    torch.manual_seed(0)
    model: HVAE = random_generator().model.train().requires_grad_(True)
    parents, others = encoded(*CASES), encoded(*[{**case, "scanner": "A", "disease": "yes"} for case in CASES])
    adversaries = Adversaries(model.sizes, CODING, CHANGED, parents)
    evidence = model(random(6, 1, 16, 12), parents, model.draw_noise(torch.Generator().manual_seed(1), 6))
    return adversaries, model, evidence, parents, others


def gradients(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_guessing_is_the_mean_entropy_of_the_training_cases_attributes(setting):
    adversaries = setting[0]
    expected = (2 * 0.25 * math.log(4) + 0.5 * math.log(2) + math.log(2)) / 2
    assert adversaries.guessing == pytest.approx(expected)
    assert not any("rates" in key for key in adversaries.state_dict())
    assert len(list(adversaries.children())) == 2


def test_the_code_adversary_learns_and_its_gradient_ends_at_the_codes(setting):
    adversaries, model, evidence, parents, _ = setting
    _, relative = adversaries.hide(evidence.codes, parents, 0.5)
    logits = adversaries[0](evidence.codes)
    own = adversarial_cross_entropy(logits, value_targets(parents, CODING, CHANGED), COUNTS)
    assert relative == pytest.approx(float(own.detach()) / adversaries.guessing)
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is None for p in adversaries[1].parameters())
    expected = torch.autograd.grad(0.5 * own, list(adversaries[0].parameters()))
    for found, one in zip(gradients(adversaries[0]), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_the_loss_of_the_codes_reaches_the_model_and_not_the_adversary(setting):
    adversaries, model, evidence, parents, _ = setting
    given_away, _ = adversaries.hide(evidence.codes, parents, 1.0)
    before = gradients(adversaries)
    given_away.backward()
    for one, other in zip(before, gradients(adversaries), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert all(p.requires_grad for p in adversaries.parameters())
    reached = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert any(name.startswith("encoder") for name in reached) and any("posterior" in name for name in reached)
    rates = adversaries.rates.expand(6, -1)
    expected = adversarial_cross_entropy(adversaries[0](evidence.codes), rates, COUNTS) - adversaries.guessing
    torch.testing.assert_close(given_away, expected)


def test_codes_without_attribute_information_have_zero_loss(setting):
    adversaries, _, evidence, parents, _ = setting
    with torch.no_grad():
        for layer in (*adversaries[0].local, *adversaries[0].whole):
            layer.weight.zero_()
            layer.bias.copy_(adversaries.rates.log())
    given_away, relative = adversaries.hide(evidence.codes, parents, 1.0)
    assert float(given_away.detach()) == pytest.approx(0, abs=1e-6)
    assert relative > 0.5


def test_the_image_adversary_learns_the_original_of_both_and_teaches_the_generator_the_other(setting):
    adversaries, model, evidence, parents, others = setting
    adversaries.eval()  # no further power iterations
    counterfactuals = model.decode(evidence.codes, others).mean
    disbelief, relative = adversaries.convince(evidence.likelihood.mean, counterfactuals, parents, others, 1.0)
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is None for p in adversaries[0].parameters())
    true, wanted = (value_targets(one, CODING, CHANGED) for one in (parents, others))
    judged = [adversaries[1](images) for images in (evidence.likelihood.mean, counterfactuals)]
    both = [torch.cat(parts) for parts in zip(*judged, strict=True)]
    own = adversarial_cross_entropy(both, torch.cat([true, true]), COUNTS)
    assert relative == pytest.approx(float(own.detach()) / adversaries.guessing, rel=1e-5)
    torch.testing.assert_close(disbelief, adversarial_cross_entropy(adversaries[1](counterfactuals), wanted, COUNTS))
    before = gradients(adversaries)
    assert all(one is not None for one in gradients(adversaries[1]))
    disbelief.backward()
    for one, other in zip(before, gradients(adversaries), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert sum(p.grad is not None for p in model.parameters()) > 10


def test_an_adversary_learns_an_attribute_that_the_codes_carry():
    model = random_generator().model
    binary = Attribute("disease", "binary", ("no", "yes"))
    torch.manual_seed(0)
    adversary = CodeAdversary(model.sizes, [binary])
    optimiser = torch.optim.AdamW(adversary.parameters(), 2e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        values = torch.randint(0, 2, (32,), generator=generator)
        codes = model.draw_noise(generator, 32)
        codes[0] = codes[0] + 2.0 * values.view(-1, 1, 1, 1)  # in the coarsest code alone
        loss = adversarial_cross_entropy(adversary(codes), nn.functional.one_hot(values, 2).float(), [2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2), abs=0.1) and sum(losses[-10:]) / 10 < 0.3
