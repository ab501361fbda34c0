"""The pretraining objectives, one file each.

An objective implements the `Objective` protocol: it draws points or masks per image, builds the model around the
network and computes the loss. `pretraining.methods` names the methods of the literature that are built from them.
"""

from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.pretraining.objectives.image_contrast import ImageContrastObjective
from nnunet_cfcl.pretraining.objectives.masked_autoencoder import MaskedAutoencoderObjective
from nnunet_cfcl.pretraining.objectives.multi_view import MultiViewObjective
from nnunet_cfcl.pretraining.objectives.pixpro import PixProObjective
from nnunet_cfcl.pretraining.objectives.silver_segmentation import SilverSegmentationObjective
from nnunet_cfcl.pretraining.point_labels import PointLabels

__all__ = [
    "DualViewObjective",
    "ImageContrastObjective",
    "MaskedAutoencoderObjective",
    "MultiViewObjective",
    "PixProObjective",
    "PointLabels",
    "SilverSegmentationObjective",
]
