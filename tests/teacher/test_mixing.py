"""Boxes exchanged between images: what is drawn, and that images, labels and masks move together."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from nnunet_cfcl.teacher.mixing import Boxes, apply_boxes, draw_boxes
from nnunet_cfcl.teacher.pseudo_labels import PseudoLabels


def boxes_of(seed: int = 0, images: int = 500, donors: int = 700, shape=(20, 30), probability=0.5, size=(0.1, 0.4)):
    return draw_boxes(Generator().manual_seed(seed), images, donors, shape, probability, size)


@pytest.mark.parametrize("shape", [(20, 30), (10, 20, 30)])
def test_boxes_lie_inside_the_patch_and_have_the_size_asked_for(shape):
    drawn = boxes_of(shape=shape)
    sides = drawn.high - drawn.low
    assert (drawn.low >= 0).all() and (drawn.high <= torch.tensor(shape)).all() and (sides >= 1).all()
    volume = (sides / torch.tensor(shape)).prod(1)
    assert volume.min() > 0.07 and volume.max() < 0.5 and 0.2 < volume.mean() < 0.3


def test_donors_are_all_other_images_and_never_the_image_itself():
    drawn = boxes_of(images=4000, donors=5)
    for image in range(4000):
        assert drawn.donor[image] != image or image >= 5
    chosen = boxes_of(images=4, donors=6, probability=1).donor
    assert (chosen >= 0).all() and (chosen < 6).all() and (chosen != torch.arange(4)).all()
    assert set(boxes_of(images=1000, donors=1001, probability=1).donor.tolist()) != {0}
    assert set(draw_boxes(Generator().manual_seed(0), 3, 5, (8, 8), 1, (0.1, 0.2)).donor.tolist()) <= set(range(5))


def test_the_probability_is_that_of_a_box_and_a_lone_image_has_none():
    assert 0.45 < (boxes_of(images=2000, donors=2000).donor >= 0).float().mean() < 0.55
    assert (boxes_of(probability=0).donor == -1).all() and (boxes_of(probability=1).donor >= 0).all()
    assert boxes_of(images=1, donors=1, probability=1).donor.tolist() == [-1]


def test_the_same_generator_draws_the_same_boxes_whatever_the_probability():
    rare, frequent = boxes_of(probability=0.2), boxes_of(probability=0.9)
    assert torch.equal(rare.low, frequent.low) and torch.equal(rare.donor[rare.donor >= 0],
                                                               frequent.donor[rare.donor >= 0])


def test_image_label_and_mask_come_from_the_same_donor_voxel():
    generator = Generator().manual_seed(0)
    donors = torch.rand(5, 2, 8, 9, generator=generator)
    labels = (donors[:, :1] * 10).long()
    known = donors[:, 1:] > 0.5
    images, pseudo = donors[:3], PseudoLabels(labels[:3], known[:3])
    drawn = draw_boxes(generator, 3, 5, (8, 9), 1.0, (0.2, 0.4))
    before = images.clone()
    mixed, found = apply_boxes(images, pseudo, drawn, donors, PseudoLabels(labels, known))
    # labels are functions of the intensities, and stay so
    assert torch.equal(found.labels, (mixed[:, :1] * 10).long()) and torch.equal(found.known, mixed[:, 1:] > 0.5)
    assert torch.equal(images, before)
    mask = drawn.mask((8, 9))
    for image in range(3):
        inside = mask[image].expand(2, -1, -1)
        assert torch.equal(mixed[image][inside], donors[int(drawn.donor[image])][inside])
        assert torch.equal(mixed[image][~inside], images[image][~inside])


def test_an_image_without_a_donor_stays_as_it_is():
    boxes = Boxes(torch.tensor([-1]), torch.tensor([[0, 0]]), torch.tensor([[4, 4]]))
    images, pseudo = torch.ones(1, 1, 4, 4), PseudoLabels(torch.ones(1, 1, 4, 4).long(), torch.ones(1, 1, 4, 4).bool())
    mixed, found = apply_boxes(images, pseudo, boxes, torch.zeros(1, 1, 4, 4), pseudo)
    assert torch.equal(mixed, images) and torch.equal(found.labels, pseudo.labels) and not boxes.mask((4, 4)).any()
