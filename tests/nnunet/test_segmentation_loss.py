"""nnU-Net's loss on stored label maps against nnU-Net's own path from data loader to loss."""

import json
import pickle

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule

from nnunet_cfcl.nnunet.segmentation_loss import segmentation_loss
from nnunet_cfcl.pretraining.objectives.silver_segmentation import SilverSegmentationObjective
from nnunet_cfcl.views import ViewGeometry

CLASSES = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "lesion": 2}
KINDS = {
    "classes": ({"labels": CLASSES}, 3), "classes, ignore": ({"labels": {**CLASSES, "ignore": 3}}, 3),
    "regions": ({"labels": REGIONS, "regions_class_order": [1, 2]}, 2),
    "regions, ignore": ({"labels": {**REGIONS, "ignore": 3}, "regions_class_order": [1, 2]}, 2),
}
PATCH = {2: (16, 24), 3: (8, 16, 12)}


ANISOTROPIC_STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]


@pytest.fixture
def make_trainer(toy):
    """Factory: (kind of labels, dimensions, deep supervision, batch dice) -> nnU-Net's trainer, without a network."""

    def make(kind: str, dim: int = 2, deep: bool = True, batch_dice: bool = True, cls=nnUNetTrainer) -> nnUNetTrainer:
        (folder,) = (toy / "nnUNet_preprocessed").iterdir()
        plans, dataset = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
        configuration = plans["configurations"]["2d"]
        configuration["batch_dice"] = batch_dice
        if dim == 3:
            configuration["architecture"]["arch_kwargs"]["strides"] = ANISOTROPIC_STRIDES
        plans["continue_training"] = False
        trainer = cls(plans, "2d", 0, {**dataset, **KINDS[kind][0]}, torch.device("cpu"))
        trainer.enable_deep_supervision = deep
        return trainer

    return make


def logits_and_labels(kind: str, dim: int, deep: bool, dtype=torch.float32):
    """Outputs of three samples at the deep supervision's scales, and stored labels with all values that occur."""
    generator = torch.Generator().manual_seed(0)
    size = PATCH[dim]
    sizes = [size, [n // s for n, s in zip(size, (1, 2, 2)[-dim:], strict=True)]] if deep else [size]
    logits = [torch.randn(3, KINDS[kind][1], *s, generator=generator).to(dtype).requires_grad_() for s in sizes]
    highest = 3 if "ignore" in kind else 2
    labels = torch.randint(-1, highest + 1, (3, 1, *size), generator=generator, dtype=torch.int16)
    return logits if deep else logits[0], labels


def nnunet_loss(trainer: nnUNetTrainer, logits, labels: torch.Tensor) -> torch.Tensor:
    """Loss of samples passed one by one through nnU-Net's validation transforms and collated as its workers do."""
    manager = trainer.label_manager
    transforms = trainer.get_validation_transforms(
        trainer._get_deep_supervision_scales(), is_cascaded=False, foreground_labels=manager.foreground_labels,
        regions=manager.foreground_regions if manager.has_regions else None, ignore_label=manager.ignore_label)
    samples = [transforms(image=torch.zeros(1), segmentation=one.clone())["segmentation"] for one in labels]
    target = [torch.stack(level) for level in zip(*samples, strict=True)] if isinstance(samples[0], list) \
        else torch.stack(samples)
    return trainer._build_loss()(logits, target)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "single"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_nnunets_own_training(make_trainer, kind, dim, deep):
    trainer = make_trainer(kind, dim, deep)
    found = []
    for loss in (segmentation_loss(trainer), lambda logits, labels: nnunet_loss(trainer, logits, labels)):
        logits, labels = logits_and_labels(kind, dim, deep)
        kept = labels.clone()
        value = loss(logits, labels)
        value.backward()
        assert torch.equal(labels, kept), "the label maps must not be changed"
        found.append((value, [part.grad for part in (logits if deep else [logits])]))
    (value, gradients), (expected, wanted) = found
    assert torch.equal(value, expected) and value.isfinite()
    assert gradients[0].abs().max() > 0
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient is None and want is None) or torch.equal(gradient, want)


@pytest.mark.parametrize("kind", ["classes, ignore", "regions, ignore"])
def test_predictions_at_ignored_voxels_do_not_change_the_loss(make_trainer, kind):
    loss = segmentation_loss(make_trainer(kind, deep=False))
    logits, labels = logits_and_labels(kind, 2, deep=False)
    ignored = (labels == 3).expand_as(logits)
    other = torch.where(ignored, logits + 5, logits)
    assert torch.equal(loss(logits, labels), loss(other, labels)) and ignored.any()
    loss(logits, labels).backward()
    assert (logits.grad[ignored] == 0).all() and (logits.grad[~ignored] != 0).all()


@pytest.mark.parametrize("kind", ["classes", "regions, ignore"])
def test_voxels_outside_of_the_image_are_background(make_trainer, kind):
    loss = segmentation_loss(make_trainer(kind))
    logits, labels = logits_and_labels(kind, 2, deep=True)
    assert torch.equal(loss(logits, labels), loss(logits, labels.clamp(min=0)))
    assert not torch.equal(loss(logits, labels), loss(logits, labels.abs()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_survives_pickling(make_trainer, kind):
    loss = segmentation_loss(make_trainer(kind))
    logits, labels = logits_and_labels(kind, 2, deep=True)
    objective = SilverSegmentationObjective(ViewGeometry(PATCH[2], (1.0, 1.0)), loss)
    again = pickle.loads(pickle.dumps(objective)).segmentation_loss
    assert torch.equal(again(logits, labels), loss(logits, labels))


@pytest.mark.parametrize("kind", ["classes, ignore", "regions"])
def test_half_precision_logits_give_a_finite_loss_close_to_the_full_one(make_trainer, kind):
    loss = segmentation_loss(make_trainer(kind))
    logits, labels = logits_and_labels(kind, 2, deep=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss([part.bfloat16() for part in logits], labels)
    torch.testing.assert_close(found.float(), loss(logits, labels), rtol=0.02, atol=0.02)


def test_without_batch_dice_the_loss_is_the_mean_over_single_views(make_trainer):
    loss = segmentation_loss(make_trainer("classes", batch_dice=False))
    logits, labels = logits_and_labels("classes", 2, deep=True)
    single = [loss([part[n : n + 1] for part in logits], labels[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(loss(logits, labels), torch.stack(single).mean())


def test_on_several_gpus_with_compilation_the_loss_neither_communicates_nor_compiles(make_trainer, monkeypatch):
    trainer = make_trainer("classes")
    monkeypatch.setattr(trainer, "is_ddp", True)
    monkeypatch.setattr(trainer, "_do_i_compile", lambda: True)
    loss = segmentation_loss(trainer)
    logits, labels = logits_and_labels("classes", 2, deep=True)
    value = loss(logits, labels)  # a collective without a process group would raise
    assert trainer.is_ddp and trainer._do_i_compile(), "the trainer itself stays as it is"
    assert not any(isinstance(module, OptimizedModule) for module in loss.loss.modules())
    monkeypatch.undo()
    assert torch.equal(value, nnunet_loss(trainer, logits, labels))


def test_the_loss_of_a_trainers_subclass_is_taken_over(make_trainer):
    class Squares(nnUNetTrainer):
        def _build_loss(self):
            return torch.nn.MSELoss()

    trainer = make_trainer("classes", deep=False, cls=Squares)
    logits, labels = torch.zeros(1, 1, 16, 24), torch.full((1, 1, 16, 24), 2, dtype=torch.int16)
    assert float(segmentation_loss(trainer)(logits, labels.float())) == 4
