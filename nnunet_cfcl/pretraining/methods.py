"""Every pretraining method by name: what its trainer's class attribute points to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nnunet_cfcl.config import Settings, ViewSettings
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.pretraining.objectives.image_contrast import ImageContrastObjective
from nnunet_cfcl.pretraining.objectives.masked_autoencoder import MaskedAutoencoderObjective
from nnunet_cfcl.pretraining.objectives.multi_view import MultiViewObjective
from nnunet_cfcl.pretraining.objectives.pixpro import PixProObjective
from nnunet_cfcl.pretraining.objectives.point_labels import PointLabels
from nnunet_cfcl.pretraining.objectives.silver_segmentation import SegmentationLoss, SilverSegmentationObjective
from nnunet_cfcl.views import ViewGeometry

#: Settings that only some methods use; the others' pretraining does not depend on them.
METHOD_SETTINGS = (
    "pretrain.points_per_image", "pretrain.projection_hidden", "pretrain.projection_dim", "pretrain.temperature",
    "pretrain.image_temperature", "pretrain.learn_temperature", "pretrain.radius", "pretrain.ignore_radius",
    "pretrain.hard_negatives", "silver.min_quality", "silver.confidence", "silver.training_cases",
    "silver.balanced_share", "baseline.mask_ratio", "baseline.mask_block", "baseline.pixpro_momentum",
    "baseline.pixpro_sharpness",
)


@dataclass(frozen=True)
class MethodContext:
    """What a method is built from.

    Args:
        settings: all settings.
        geometry: patch size and spacing.
        channels: of the images.
        ignore_label: the dataset's, or None.
        segmentation_loss: makes (logits, label map (N, 1, *patch)) -> scalar, nnU-Net's own.
    """

    settings: Settings
    geometry: ViewGeometry
    channels: int
    ignore_label: int | None
    segmentation_loss: Callable[[], SegmentationLoss]


@dataclass(frozen=True)
class Method:
    """A pretraining method.

    Args:
        name: as in the literature.
        contrasts: in words, what is pulled together; for the table of trainers.
        source: where it comes from.
        build: makes the objective.
        reads: how those of `METHOD_SETTINGS` begin that it uses.
        counterfactuals: views 1, 2, ... are cut from counterfactuals; False: from the original.
        paper_views: settings of the views in which the paper's experiment differs from its other ones.
    """

    name: str
    contrasts: str
    source: str
    build: Callable[[MethodContext], Objective]
    reads: tuple[str, ...] = ()
    counterfactuals: bool = True
    paper_views: Mapping[str, Any] = field(default_factory=dict)

    def example(self) -> Objective:
        """The objective with default settings, to ask what it uses."""
        return self.build(MethodContext(Settings(), ViewGeometry((64, 64), (1.0, 1.0)), 1, None, lambda: _no_loss))

    def unused(self) -> list[str]:
        """Settings of `METHOD_SETTINGS` that this method does not use."""
        return [key for key in METHOD_SETTINGS if not key.startswith(self.reads)]

    def adapt(self, settings: Settings) -> Settings:
        """The settings with the preset applied."""
        if settings.preset == "paper":
            return replace(settings, views=replace(ViewSettings(), **self.paper_views))
        return settings


def _no_loss(logits: Any, labels: Tensor) -> Tensor:
    raise NotImplementedError("an example is not trained")


def _dual_view(context: MethodContext, supervised: bool = False) -> Objective:
    chosen = context.settings.pretrain
    return DualViewObjective(
        chosen.points_per_image, _labels(context) if supervised else None, chosen.ignore_radius, chosen.hard_negatives
    )


def _multi_view(context: MethodContext, supervised: bool = False) -> Objective:
    chosen = context.settings.pretrain
    return MultiViewObjective(
        chosen.points_per_image, chosen.radius, _labels(context) if supervised else None, chosen.hard_negatives
    )


def _pixpro(context: MethodContext) -> Objective:
    chosen, own = context.settings.pretrain, context.settings.baseline
    return PixProObjective(chosen.points_per_image, chosen.radius, own.pixpro_momentum, own.pixpro_sharpness)


def _masked_autoencoder(context: MethodContext) -> Objective:
    chosen = context.settings.baseline
    return MaskedAutoencoderObjective(
        context.geometry.patch_size, context.channels, chosen.mask_ratio, chosen.mask_block
    )


def _labels(context: MethodContext) -> PointLabels:
    return PointLabels(context.settings.silver.balanced_share, context.ignore_label)


PAPER = "arXiv 2603.17110"
INTENSITY_EFFECTS_ONLY = {"rotation_deg": 0.0, "crop_fraction": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}

_HEAD = ("pretrain.projection_hidden", "pretrain.projection_dim")
_POINTS = (*_HEAD, "pretrain.points_per_image")
_CONTRAST = (*_POINTS, "pretrain.temperature", "pretrain.learn_temperature", "pretrain.hard_negatives")
_DUAL, _MULTI = (*_CONTRAST, "pretrain.ignore_radius"), (*_CONTRAST, "pretrain.radius")

DVD_CL = Method("DVD-CL", "the same point of original and counterfactual", PAPER, _dual_view, _DUAL)
MVD_CL = Method("MVD-CL", "points near each other in the patient, all views", PAPER, _multi_view, _MULTI)
S_DVD_CL = Method(
    "S-DVD-CL", "points of one class, original against counterfactual", PAPER,
    lambda context: _dual_view(context, supervised=True), (*_DUAL, "silver."),
)
S_MVD_CL = Method(
    "S-MVD-CL", "points of one class, all views", PAPER,
    lambda context: _multi_view(context, supervised=True), (*_MULTI, "silver."),
)
VADER = Method(
    "VADeR", "the same point of two views", "arXiv 2011.05499", _dual_view, _DUAL, counterfactuals=False,
    paper_views={"rotation_deg": 0.0},
)
SSDCL = replace(S_MVD_CL, name="SSDCL", counterfactuals=False, paper_views=INTENSITY_EFFECTS_ONLY)
SIMCLR = Method(
    "SimCLR", "whole views of one image (encoder only)", "arXiv 2002.05709",
    lambda context: ImageContrastObjective(context.settings.pretrain.image_temperature),
    (*_HEAD, "pretrain.image_temperature", "pretrain.learn_temperature"), counterfactuals=False,
)
CF_SIMCLR = replace(
    SIMCLR, name="CF-SimCLR", contrasts="whole image and counterfactual (encoder only)", source="arXiv 2403.09605",
    counterfactuals=True,
)
SILVER_SEG = Method(
    "supervised", "voxels and their labels, nnU-Net's own loss", PAPER,
    lambda context: SilverSegmentationObjective(context.geometry, context.segmentation_loss()), ("silver.",),
    counterfactuals=False,
)
PIX_PRO = Method(
    "PixPro", "points near each other in two views, no negatives", "arXiv 2011.10043", _pixpro,
    (*_POINTS, "pretrain.radius", "baseline.pixpro_"), counterfactuals=False,
)
MAE = Method(
    "MAE", "masked blocks and their reconstruction", "arXiv 2111.06377, 2410.23132", _masked_autoencoder,
    ("baseline.mask_",), counterfactuals=False,
)
