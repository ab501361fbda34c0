"""The pretraining methods, one constant each; a trainer names its method as a class attribute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nnunet_cfcl.config import Reader, Settings, ViewSettings
from nnunet_cfcl.pretraining.objective import Objective, Tap
from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.pretraining.objectives.image_contrast import ImageContrastObjective
from nnunet_cfcl.pretraining.objectives.masked_autoencoder import MaskedAutoencoderObjective
from nnunet_cfcl.pretraining.objectives.multi_view import MultiViewObjective
from nnunet_cfcl.pretraining.objectives.pixpro import PixProObjective
from nnunet_cfcl.pretraining.objectives.silver_segmentation import SegmentationLoss, SilverSegmentationObjective
from nnunet_cfcl.pretraining.point_labels import PointLabels
from nnunet_cfcl.views import ViewGeometry


@dataclass(frozen=True)
class MethodContext:
    """Everything an objective is built from.

    Args:
        settings: all settings.
        geometry: patch size and spacing.
        channels: channels of the images.
        ignore_label: the dataset's ignore label; None if it has none.
        segmentation_loss: factory of nnU-Net's loss, (logits, label map (N, 1, *patch)) -> scalar.
    """

    settings: Settings
    geometry: ViewGeometry
    channels: int
    ignore_label: int | None
    segmentation_loss: Callable[[], SegmentationLoss]


@dataclass(frozen=True)
class Method:
    """A pretraining method: an objective, the kind of its views, and the facts that the doctor and the tables report.

    Args:
        name: name in the literature.
        contrasts: what is pulled together, in words, for the table of trainers.
        source: reference.
        build: factory of the objective.
        reads: readers whose settings the method reads, see `config.setting`.
        tap: part of the network that is trained; equal to the objective's.
        separable: whether the loss is a mean over views; equal to the objective's.
        needs_labels: whether the labels of the images are read; equal to the objective's.
        counterfactuals: whether views 1, 2, ... are cut from counterfactuals; otherwise from the original image.
        paper_views: settings of the views that differ from the defaults in the paper's experiment with this method.
    """

    name: str
    contrasts: str
    source: str
    build: Callable[[MethodContext], Objective]
    reads: tuple[Reader, ...] = ()
    tap: Tap = "decoder"
    separable: bool = False
    needs_labels: bool = False
    counterfactuals: bool = True
    paper_views: Mapping[str, Any] = field(default_factory=dict)

    def adapt(self, settings: Settings) -> Settings:
        """Apply ``preset`` to the settings."""
        if settings.preset == "paper":
            return replace(settings, views=replace(ViewSettings(), **self.paper_views))
        return settings


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

DVD_CL = Method("DVD-CL", "the same point of original and counterfactual", PAPER, _dual_view, ("dual_view",))
MVD_CL = Method("MVD-CL", "points near each other in the patient, all views", PAPER, _multi_view, ("multi_view",))
S_DVD_CL = Method(
    "S-DVD-CL", "points of one class, original against counterfactual", PAPER,
    lambda context: _dual_view(context, supervised=True), ("dual_view", "labels"), needs_labels=True,
)
S_MVD_CL = Method(
    "S-MVD-CL", "points of one class, all views", PAPER,
    lambda context: _multi_view(context, supervised=True), ("multi_view", "labels"), needs_labels=True,
)
VADER = Method(
    "VADeR", "the same point of two views", "arXiv 2011.05499", _dual_view, ("dual_view",), counterfactuals=False,
    paper_views={"rotation_deg": 0.0},
)
SSDCL = replace(S_MVD_CL, name="SSDCL", counterfactuals=False, paper_views=INTENSITY_EFFECTS_ONLY)
SIMCLR = Method(
    "SimCLR", "whole views of one image (encoder only)", "arXiv 2002.05709",
    lambda context: ImageContrastObjective(context.settings.pretrain.image_temperature), ("image_contrast",),
    tap="encoder", counterfactuals=False,
)
CF_SIMCLR = replace(
    SIMCLR, name="CF-SimCLR", contrasts="whole image and counterfactual (encoder only)", source="arXiv 2403.09605",
    counterfactuals=True,
)
SILVER_SEG = Method(
    "supervised", "voxels and their labels, nnU-Net's own loss", PAPER,
    lambda context: SilverSegmentationObjective(context.geometry, context.segmentation_loss()), ("labels",),
    tap="segmentation", separable=True, needs_labels=True, counterfactuals=False,
)
PIX_PRO = Method(
    "PixPro", "points near each other in two views, no negatives", "arXiv 2011.10043", _pixpro, ("pixpro",),
    counterfactuals=False,
)
MAE = Method(
    "MAE", "masked blocks and their reconstruction", "arXiv 2111.06377, 2410.23132", _masked_autoencoder,
    ("masked_autoencoder",), separable=True, counterfactuals=False,
)
