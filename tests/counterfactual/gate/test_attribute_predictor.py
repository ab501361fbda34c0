"""The network that tells attributes from images."""

import math

import pytest
import torch

from nnunet_cfcl.counterfactual.gate.attribute_predictor import (
    AttributePredictor,
    accuracy_by_value,
    attribute_loss,
    balanced,
    train_predictor,
    value_indices,
    value_weights,
)
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.errors import UserError
from tests.counterfactual import phantom_generators
from tests.counterfactual.phantom_generators import phantoms, scale_of

SITE, SEX = Attribute("site", "categorical", ("A", "B", "C")), Attribute("sex", "binary", ("F", "M"))
AGE = Attribute("age", "continuous", (), 50, 10)
CODING = AttributeCoding((SITE, AGE, SEX))
BOTH = pytest.mark.parametrize("architecture", ["residual", "plain"])
SHAPES = pytest.mark.parametrize("shape", [(32, 40), (33, 21), (9, 18, 20), (5, 6)])


def plain_scale(channels: int = 1) -> IntensityScale:
    zero = torch.zeros(channels)
    return IntensityScale(zero, zero + 1, zero - 10, zero + 10)


def patches_of(images: torch.Tensor, cells: list[dict[str, str]]) -> Patches:
    return Patches(images, tuple(f"c{n}" for n in range(len(images))), tuple(cells))


@BOTH
@SHAPES
def test_the_probabilities_of_every_attribute_but_continuous_ones_add_up_to_one(architecture, shape):
    predictor = AttributePredictor(CODING.attributes, shape, 2, architecture, plain_scale(2))
    found = predictor.log_probabilities(torch.randn(3, 2, *shape))
    assert {name: part.shape for name, part in found.items()} == {"site": (3, 3), "sex": (3, 2)}
    for part in found.values():
        torch.testing.assert_close(part.exp().sum(1), torch.ones(3))


@BOTH
def test_a_gradient_reaches_every_voxel_of_the_images(architecture):
    predictor = AttributePredictor(CODING.attributes, (24, 24), 1, architecture, plain_scale()).requires_grad_(False)
    images = torch.randn(2, 1, 24, 24, requires_grad=True)
    predictor.log_probabilities(images)["site"][:, 0].sum().backward()
    # a maximum passes on the gradient of one voxel only
    assert (images.grad != 0).float().mean() > 0.5


@BOTH
def test_images_are_seen_through_the_scale(architecture):
    torch.manual_seed(0)
    images, values = torch.randn(4, 1, 24, 24), torch.tensor
    near = AttributePredictor(CODING.attributes, (24, 24), 1, architecture, plain_scale())
    far = AttributePredictor(CODING.attributes, (24, 24), 1, architecture,
                             IntensityScale(values([100.0]), values([5.0]), values([-1e3]), values([1e3])))
    far.load_state_dict(near.state_dict())
    torch.testing.assert_close(far.log_probabilities(100 + 5 * images), near.log_probabilities(images),
                               rtol=1e-3, atol=1e-4)


def test_the_two_architectures_share_no_shape_of_a_spatial_kernel():
    kernels = []
    for name in ("residual", "plain"):
        predictor = AttributePredictor(CODING.attributes, (96, 96), 1, name, plain_scale())
        kernels.append({tuple(p.shape) for p in predictor.parameters() if p.ndim == 4 and p.shape[-1] > 1})
    assert kernels[0] and kernels[1] and not kernels[0] & kernels[1]


def test_an_unknown_architecture_raises():
    with pytest.raises(ValueError, match="residual, plain, found 'large'"):
        AttributePredictor(CODING.attributes, (24, 24), 1, "large", plain_scale())


def test_values_are_numbered_as_the_attribute_lists_them_and_unknown_ones_are_minus_one():
    cells = [{"site": "C"}, {"site": "A"}, {"site": "unknown"}, {}]
    assert value_indices(SITE, cells).tolist() == [2, 0, -1, -1]
    with pytest.raises(UserError, match="has the values A, B, C, found 'D'"):
        value_indices(SITE, [{"site": "D"}])


def test_rare_values_weigh_more_so_that_all_that_occur_count_the_same():
    values = torch.tensor([0] * 6 + [2] * 2 + [-1] * 5)
    weights = value_weights(values, 4)
    # 8 known cases of 2 values: 8 / (2 * 6) and 8 / (2 * 2)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 0.0, 2.0, 0.0]))
    known = values[values >= 0]
    assert float(weights[known].mean()) == pytest.approx(1)
    assert value_weights(torch.tensor([-1, -1]), 2).tolist() == [0, 0]


def test_the_loss_is_the_weighted_cross_entropy_of_the_known_values():
    torch.manual_seed(0)
    found = {"site": torch.randn(4, 3).log_softmax(1), "sex": torch.randn(4, 2).log_softmax(1)}
    known = {"site": torch.tensor([0, 2, -1, 1]), "sex": torch.tensor([-1, -1, 1, 0])}
    weights = {"site": torch.tensor([1.0, 2.0, 3.0]), "sex": torch.tensor([0.5, 4.0])}
    expected = 0.0
    for name, values in known.items():
        for n, value in enumerate(values.tolist()):
            if value >= 0:
                expected -= float(weights[name][value] * found[name][n, value]) / 4
    assert float(attribute_loss(found, known, weights)) == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_known_values_has_zero_loss():
    found = {"sex": torch.zeros(2, 2, requires_grad=True).log_softmax(1)}
    loss = attribute_loss(found, {"sex": torch.tensor([-1, -1])}, {"sex": torch.ones(2)})
    loss.backward()
    assert float(loss.detach()) == 0


def test_accuracy_counts_every_value_the_same_and_leaves_unknown_ones_out():
    values = torch.tensor([0, 0, 0, 1, -1])
    shares = accuracy_by_value(torch.tensor([0, 0, 1, 1, 1]), values)
    assert shares == {0: pytest.approx(2 / 3), 1: 1.0} and balanced(shares) == pytest.approx(5 / 6)
    assert balanced({0: 0.4}) is None


def accuracy(predictor: AttributePredictor, patches: Patches, attribute: Attribute) -> float | None:
    found = predictor.predictions(patches.images)[attribute.name]
    return balanced(accuracy_by_value(found, value_indices(attribute, patches.cells)))


def noise_with(brightness: torch.Tensor, contrast: torch.Tensor, seed: int) -> torch.Tensor:
    """(N, 1, 24, 24) with a random gradient, so that position does not tell the group."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn((len(brightness), 1, 24, 24), generator=random)
    return images * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)


@BOTH
@pytest.mark.parametrize("kind", ["brightness", "contrast"])
def test_groups_that_differ_only_in_brightness_or_contrast_are_distinguished(architecture, kind):
    group = torch.arange(120) % 2
    shift = 0.4 * group if kind == "brightness" else torch.zeros(120)
    factor = 1 + 0.5 * group if kind == "contrast" else torch.ones(120)
    images = noise_with(shift, factor, 0)
    cells = [{"site": "C" if n % 7 == 0 else "A", "sex": "FM"[int(g)]} for n, g in enumerate(group)]
    patches = patches_of(images, cells)
    predictor = train_predictor(patches, CODING, architecture, 250, 0, "cpu", plain_scale())
    test = patches_of(noise_with(shift, factor, 1), cells)
    assert accuracy(predictor, test, SEX) >= 0.95


@BOTH
def test_a_predictor_learns_despite_rare_and_unknown_values(architecture):
    """9 of 10 known cases are of group F, and a third of all cases is unknown."""
    group = (torch.arange(120) % 10 == 0).long()
    images = noise_with(1.0 * group, torch.ones(120), 0)
    cells = [{"sex": "" if n % 3 == 1 else "FM"[int(g)]} for n, g in enumerate(group)]
    coding = AttributeCoding((SEX,))
    predictor = train_predictor(patches_of(images, cells), coding, architecture, 150, 0, "cpu", plain_scale())
    test = patches_of(noise_with(1.0 * group, torch.ones(120), 1), [{"sex": "FM"[int(g)]} for g in group])
    assert accuracy(predictor, test, SEX) >= 0.95


@BOTH
def test_the_same_seed_gives_the_same_predictor_and_another_another(architecture):
    patches = patches_of(torch.randn(12, 1, 16, 16), [{"sex": "FM"[n % 2]} for n in range(12)])
    one, same, other = (train_predictor(patches, CODING, architecture, 3, seed, "cpu", plain_scale()).head.weight
                        for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_without_an_attribute_to_predict_training_raises():
    with pytest.raises(ValueError, match="no binary or categorical attribute"):
        train_predictor(patches_of(torch.zeros(2, 1, 8, 8), [{}, {}]), AttributeCoding((AGE,)), "plain", 1, 0, "cpu",
                        plain_scale())


def test_a_volume_is_predicted_image_by_image_as_in_one_pass():
    torch.manual_seed(0)
    predictor = AttributePredictor(CODING.attributes, (8, 12, 12), 1, "plain", plain_scale()).eval()
    images = torch.randn(19, 1, 8, 12, 12)
    together = predictor.predictions(images)
    alone = [int(predictor.predictions(images[n : n + 1])["site"]) for n in range(19)]
    assert together["site"].tolist() == alone and together["sex"].shape == (19,)


@BOTH
@pytest.mark.nightly
def test_scanner_and_disease_of_the_phantom_are_classified_with_95_percent_accuracy(architecture):
    """As the gate trains it: 240 patients, 600 steps; guessing is right in half of the cases."""
    train, test = (phantoms(count, unseen, (96, 96), (1.0, 1.0)) for count, unseen in ((240, False), (60, True)))
    predictor = train_predictor(
        train.patches, phantom_generators.CODING, architecture, 600, 0, "cpu", scale_of(train.patches))
    for attribute in (phantom_generators.SCANNER, phantom_generators.DISEASE):
        found = accuracy(predictor, test.patches, attribute)
        assert found is not None and not math.isnan(found) and found >= 0.95
