"""Segmentation pretraining: labels follow their views, the loss does not depend on passes."""

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn import functional

from nnunet_cfcl.config import PretrainSettings, ViewSettings
from nnunet_cfcl.nnunet.segmentation_loss import NnUNetLoss
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.objectives.silver_segmentation import SilverSegmentationObjective
from nnunet_cfcl.views import ViewGeometry, apply_affine_views, crop_size, draw_affine_views


def cross_entropy(logits, labels):
    logits = logits[0] if isinstance(logits, list) else logits
    return functional.cross_entropy(logits, labels[:, 0].long(), ignore_index=-1)


def build(network, deep: bool = False):
    objective = SilverSegmentationObjective(ViewGeometry((6, 8), (1.0, 1.0)), cross_entropy)
    body = nn.Sequential(network(), Twice()) if deep else network()
    return objective, objective.build_model(body, 6, PretrainSettings()).double()


class Twice(nn.Module):
    """Deep supervision: a list of outputs."""

    def forward(self, logits):
        return [logits, logits[..., ::2, ::2]]


@pytest.fixture
def images_and_labels():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 6, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 6, (4, 1, 6, 8), generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("size", [(24, 32), (12, 20, 16)])
def test_labels_are_cut_along_with_the_images_of_their_rows(size):
    dim, generator = len(size), torch.Generator().manual_seed(1)
    geometry, settings = ViewGeometry(size, (1.0, 2.0, 1.5)[:dim]), ViewSettings(rotation_deg=15.0)
    crop = crop_size(geometry, settings)
    coarse = torch.randint(0, 9, (3, 1, *[4] * dim), generator=generator).float()
    labels = functional.interpolate(coarse, crop, mode="nearest-exact")
    confidence = torch.full_like(labels, 77)
    matrices = torch.stack([draw_affine_views(generator, geometry, settings, 2) for _ in range(3)])
    batch = {"labels": torch.cat([labels, confidence], dim=1).to(torch.int16), "matrices": matrices}
    rows = [(1, 0), (1, 1), (2, 0)]
    found = SilverSegmentationObjective(geometry, cross_entropy).inputs(batch, rows, torch.device("cpu"))
    chosen = torch.stack([matrices[i, v] for i, v in rows])
    views = apply_affine_views(torch.stack([labels[i] for i, _ in rows]), chosen, geometry)
    away_from_borders = (views - views.round()).abs() < 1e-4
    assert found.dtype == torch.int16 and found.shape == (3, 1, *size)
    # a blend of two labels may be a whole number too
    same = (found == views.round())[away_from_borders].float().mean()
    assert away_from_borders.float().mean() > 0.5 and same > 0.99


@pytest.mark.parametrize("deep", [False, True])
def test_the_loss_is_the_given_one_view_by_view(network, images_and_labels, deep):
    objective, model = build(network, deep)
    images, labels = images_and_labels
    labels[0, 0, :3] = -1
    outputs = model(images, labels)
    expected = [cross_entropy(model.network(images[n : n + 1]), labels[n : n + 1]) for n in range(4)]
    torch.testing.assert_close(outputs, torch.stack(expected))
    torch.testing.assert_close(objective.loss(model, outputs, {})[0], torch.stack(expected).mean())


@pytest.mark.parametrize("batch_dice", [False, True])
def test_nnunets_loss_gives_the_same_gradients_in_any_number_of_passes(network, images_and_labels, batch_dice):
    loss = DC_and_CE_loss({"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
                          dice_class=MemoryEfficientSoftDiceLoss)
    objective = SilverSegmentationObjective(ViewGeometry((6, 8), (1.0, 1.0)), NnUNetLoss(loss, None, None))
    images, labels = images_and_labels
    gradients = []
    for size in (4, 3, 1):
        model = objective.build_model(network(), 6, PretrainSettings()).double()
        for part in torch.arange(4).split(size):
            value = objective.loss(model, model(images[part], labels[part]), {})[0]
            (value * len(part) / 4).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)


def test_images_without_labels_are_never_drawn(make_task, cases_in_memory):
    labels = {"case_2": np.stack([np.ones((1, 40, 44)), np.full((1, 40, 44), 100)]).astype(np.int16)}
    reader = cases_in_memory(label_maps=labels)
    objective = SilverSegmentationObjective(ViewGeometry((24, 28), (1.0, 1.0)), cross_entropy)
    task = make_task(reader=reader, objective=objective)
    data = PretrainingDataset(reader, task.source, objective, task.geometry, task.settings, steps=2)
    assert {data._case(index) for index in range(len(data))} == {"case_2"}
