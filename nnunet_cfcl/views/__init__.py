"""Random views of an image: affine geometry with known coordinates, points with their labels, intensity effects.

Random choices are drawn on the CPU from a given ``torch.Generator`` (functions ``draw_*``, which return plain tensors).
Deterministic operations are batched and run on any device (functions ``apply_*`` and ``read_*``). The room does not
depend on nnU-Net.
"""

from nnunet_cfcl.views.class_balance import ClassBalance
from nnunet_cfcl.views.crop_box import CropBox, draw_crop_box, read_crop
from nnunet_cfcl.views.geometry import (
    ViewGeometry,
    apply_affine_views,
    check_patch,
    crop_size,
    draw_affine_views,
    overlap_share,
    to_canonical,
    to_view,
)
from nnunet_cfcl.views.intensity import IntensityParameters, apply_intensity, draw_intensity
from nnunet_cfcl.views.labels import apply_affine_labels, read_labels
from nnunet_cfcl.views.sampling import draw_corresponding_points, draw_view_points, read_features, tissue_box

__all__ = [
    "ClassBalance",
    "CropBox",
    "IntensityParameters",
    "ViewGeometry",
    "apply_affine_labels",
    "apply_affine_views",
    "apply_intensity",
    "check_patch",
    "crop_size",
    "draw_affine_views",
    "draw_corresponding_points",
    "draw_crop_box",
    "draw_intensity",
    "draw_view_points",
    "overlap_share",
    "read_crop",
    "read_features",
    "read_labels",
    "tissue_box",
    "to_canonical",
    "to_view",
]
