"""The loss on pseudo-labels: nnU-Net's own loss where everything is known, an obvious oracle elsewhere, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_cfcl.losses import pseudo_label_loss


def drawn(heads: int = 3, shape: tuple[int, ...] = (4, 5), images: int = 2):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(images, heads, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(heads, (images, 1, *shape), generator=generator)
    known = torch.rand(images, 1, *shape, generator=generator) < 0.6
    return logits, labels, known


def oracle(logits, labels, known) -> float:
    """Voxel by voxel, in Python's own numbers."""
    heads, entropy, voxels = logits.shape[1], 0.0, 0
    overlap, predicted, labelled = ([0.0] * heads for _ in range(3))
    for image in range(len(logits)):
        for place in torch.cartesian_prod(*[torch.arange(n) for n in logits.shape[2:]]).tolist():
            row = logits[(image, slice(None), *place)]
            chance = [math.exp(one) / sum(math.exp(other) for other in row.tolist()) for one in row.tolist()]
            voxels += 1
            if not known[(image, 0, *place)]:
                continue
            label = int(labels[(image, 0, *place)])
            entropy -= math.log(chance[label])
            for head in range(heads):
                overlap[head] += chance[head] * (label == head)
                predicted[head] += chance[head]
                labelled[head] += label == head
    dice = [(2 * a + 1e-5) / (b + c + 1e-5) for a, b, c in zip(overlap, predicted, labelled)][1:]
    return entropy / voxels + 1 - sum(dice) / len(dice)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4)])
def test_it_equals_the_sum_over_single_voxels(shape):
    logits, labels, known = drawn(shape=shape)
    assert pseudo_label_loss(logits, labels, known).item() == pytest.approx(oracle(logits, labels, known), abs=1e-10)


def test_where_all_is_known_it_is_nnunet_s_cross_entropy_and_batch_dice():
    logits, labels, known = drawn()
    dice = MemoryEfficientSoftDiceLoss(apply_nonlin=lambda x: x.softmax(1), batch_dice=True, do_bg=False, smooth=1e-5,
                                       ddp=False)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 0]) + 1 + dice(logits, labels)
    assert pseudo_label_loss(logits, labels, torch.ones_like(known)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_regions_have_a_sigmoid_each():
    logits, _, _ = drawn(heads=2)
    truth, known = torch.rand(logits.shape) < 0.5, torch.rand(logits.shape) < 0.7
    p = logits.sigmoid()
    entropy = -(torch.where(truth, p, 1 - p).log() * known).mean()
    overlap, both = ((part * known).sum((0, 2, 3)) for part in (p * truth, p + truth))
    expected = entropy + 1 - ((2 * overlap + 1e-5) / (both + 1e-5)).mean()
    assert pseudo_label_loss(logits, truth, known, regions=True).item() == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("regions", [False, True])
def test_gradients_are_exact_and_unknown_voxels_have_none(regions):
    logits, labels, known = drawn()
    if regions:
        labels, known = (labels == torch.tensor([0, 1, 2]).reshape(1, 3, 1, 1)), known.expand(-1, 3, -1, -1)
    assert torch.autograd.gradcheck(lambda x: pseudo_label_loss(x, labels, known, regions), logits)
    pseudo_label_loss(logits, labels, known, regions).backward()
    unknown = ~known if regions else ~known.expand_as(logits)
    assert logits.grad[unknown].abs().max() == 0 < logits.grad[~unknown].abs().min()


def test_nothing_known_costs_nothing():
    logits, labels, known = drawn()
    loss = pseudo_label_loss(logits, labels, torch.zeros_like(known))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_labels_of_unknown_voxels_do_not_matter_even_where_they_are_no_class():
    logits, labels, known = drawn()
    other = torch.where(known, labels, torch.full_like(labels, 99))
    assert pseudo_label_loss(logits, labels, known) == pseudo_label_loss(logits, other, known)


def test_weights_scale_every_voxel_s_part():
    logits, labels, known = drawn()
    weights = known * torch.rand(known.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = logits.softmax(1)
    entropy = -(p.gather(1, labels).log() * weights).mean()
    truth = torch.cat([labels == 1, labels == 2], 1)
    overlap, both = ((part * weights).sum((0, 2, 3)) for part in (p[:, 1:] * truth, p[:, 1:] + truth))
    expected = entropy + 1 - ((2 * overlap + 1e-5) / (both + 1e-5)).mean()
    assert pseudo_label_loss(logits, labels, weights).item() == pytest.approx(expected.item(), abs=1e-10)


def test_half_precision_is_computed_in_single_precision():
    logits, labels, known = drawn()
    loss = pseudo_label_loss(logits.detach().half(), labels, known)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(oracle(logits, labels, known), abs=1e-2)
