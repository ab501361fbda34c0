"""The small segmentation network that watches over the anatomy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_cfcl.counterfactual.gate.small_segmenter import (
    SmallSegmenter,
    dice_scores,
    segmentation_loss,
    train_segmenter,
)
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale

SCALE = IntensityScale(torch.zeros(1), torch.ones(1), torch.full((1,), -10.0), torch.full((1,), 10.0))


def discs(count: int, seed: int, labels: tuple[int, int] = (3, 7)) -> Patches:
    """Bright and dark discs of two labels at random places, in noise."""
    random = np.random.default_rng(seed)
    y, x = np.indices((32, 32))
    images, maps = [], []
    for _ in range(count):
        image, label_map = random.normal(0, 0.1, (32, 32)), np.zeros((32, 32), np.int16)
        for label, brightness, half in ((labels[0], 1.0, 0), (labels[1], -1.0, 16)):
            centre = random.integers(7, 25), half + random.integers(6, 11)
            inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 25
            image[inside] += brightness
            label_map[inside] = label
        images.append(image[None])
        maps.append(label_map)
    return Patches(torch.tensor(np.stack(images), dtype=torch.float32), tuple(f"{seed}_{n}" for n in range(count)),
                   ({},) * count, torch.tensor(np.stack(maps)))


@pytest.mark.parametrize("shape", [(32, 40), (33, 21), (9, 18, 20), (6, 7)])
def test_there_is_a_logit_for_every_voxel_and_label(shape):
    network = SmallSegmenter([0, 1, 4], shape, 1, SCALE)
    images = torch.randn(2, 1, *shape)
    assert network(images).shape == (2, 3, *shape)
    found = network.segment(images)
    assert found.shape == (2, *shape) and found.dtype == torch.int16 and set(found.unique().tolist()) <= {0, 1, 4}


def test_discs_are_segmented_in_place_with_their_own_labels():
    segmenter = train_segmenter(discs(40, 0), 120, 0, "cpu", SCALE)
    test = discs(10, 1)
    assert segmenter.labels == (0, 3, 7)
    assert float(dice_scores(segmenter.segment(test.images), test.labels, (3, 7)).mean()) > 0.85
    moved = test.images.roll(4, 2)
    assert float(dice_scores(segmenter.segment(moved), test.labels, (3, 7)).mean()) < 0.7


def test_cases_without_labels_and_unknown_voxels_are_left_out():
    patches = discs(6, 0)
    labels = patches.labels.clone()
    labels[3:] = -1
    labels[0, :5] = -1
    images = patches.images.clone()
    images[3:] = float("nan")  # would spoil the network if they were seen
    segmenter = train_segmenter(replace(patches, images=images, labels=labels), 3, 0, "cpu", SCALE)
    assert segmenter.labels == (0, 3, 7)
    assert all(parameter.isfinite().all() for parameter in segmenter.parameters())


def test_unlabelled_voxels_are_not_learned_as_background():
    """The dark discs are unknown in three of four images."""
    patches = discs(40, 0)
    labels = patches.labels.clone()
    labels[10:][labels[10:] == 7] = -1
    segmenter = train_segmenter(replace(patches, labels=labels), 120, 0, "cpu", SCALE)
    test = discs(10, 1)
    assert float(dice_scores(segmenter.segment(test.images), test.labels, (7,)).mean()) > 0.7


def test_with_fewer_than_two_labels_there_is_no_segmenter():
    patches = discs(2, 0)
    assert train_segmenter(replace(patches, labels=None), 1, 0, "cpu", SCALE) is None
    for value in (-1, 0):
        alike = replace(patches, labels=torch.full_like(patches.labels, value))
        assert train_segmenter(alike, 1, 0, "cpu", SCALE) is None


def test_the_loss_vanishes_for_a_perfect_answer_and_ignores_unknown_voxels():
    truth = torch.randint(0, 3, (2, 8, 8))
    right = 50.0 * torch.nn.functional.one_hot(truth, 3).movedim(-1, 1)
    assert float(segmentation_loss(right, truth)) == pytest.approx(0, abs=1e-4)
    wrong = right.roll(1, 1)
    assert float(segmentation_loss(wrong, truth)) > 10
    unknown = truth.clone()
    unknown[:, :4] = -1
    half_wrong = torch.cat([wrong[:, :, :4], right[:, :, 4:]], 2)
    assert float(segmentation_loss(half_wrong, unknown)) == pytest.approx(0, abs=1e-4)


def test_the_loss_is_that_of_a_slow_loop():
    torch.manual_seed(0)
    logits, truth = torch.randn(2, 3, 4, 5), torch.randint(-1, 3, (2, 4, 5))
    probabilities = logits.softmax(1)
    cross, dice = [], []
    for n, y, x in (truth >= 0).nonzero().tolist():
        cross.append(-float(probabilities[n, truth[n, y, x], y, x].log()))
    for label in (1, 2):
        found = sum(float(probabilities[n, label, y, x]) for n, y, x in (truth >= 0).nonzero().tolist())
        both = sum(float(probabilities[n, label, y, x]) for n, y, x in (truth == label).nonzero().tolist())
        dice.append((2 * both + 1) / (found + int((truth == label).sum()) + 1))
    assert float(segmentation_loss(logits, truth)) == pytest.approx(np.mean(cross) + 1 - np.mean(dice), rel=1e-5)


def test_dice_is_averaged_over_the_labels_that_an_image_has():
    truth = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 0], [-1, 1, 1, 0], [0, 0, 0, 0]])
    found = torch.tensor([[0, 1, 0, 2], [0, 1, 1, 2], [1, 1, 1, 0], [1, 1, 1, 1]])
    scores = dice_scores(found, truth, (1, 2))
    # image 0: 2 * 1 / 3 and 1; images 1 and 2 have label 1 alone, an unknown voxel does not count; image 3 has none
    torch.testing.assert_close(scores, torch.tensor([(2 / 3 + 1) / 2, 1.0, 1.0, float("nan")]), equal_nan=True)
