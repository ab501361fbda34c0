"""From nnU-Net's preprocessed voxels back to the input's own: pixels, axes and geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import nibabel
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray
from torch import Tensor

from nnunet_cfcl.chromap.nifti import Geometry


def to_input_voxels(
    coordinates: Tensor, properties: Mapping[str, Any], plans: PlansManager, configuration: ConfigurationManager
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Resample plane coordinates to the voxels of the input, by the steps of nnU-Net's export.

    Args:
        coordinates: (2, *preprocessed shape).
        properties: properties of the preprocessed case.
        plans, configuration: plan and configuration of the model.

    Returns:
        (2, Z, Y, X) in half precision, zero outside of the box that nnU-Net crops to, and that box as a mask (Z, Y, X).
    """
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    # a 2d plan has no spacing between slices
    current = [*spacing[: len(shape) - len(configuration.spacing)], *configuration.spacing]
    resampled = torch.as_tensor(configuration.resampling_fn_probabilities(coordinates.float(), shape, current, spacing))
    whole = tuple(int(n) for n in properties["shape_before_cropping"])
    placed = torch.zeros((2, *whole), dtype=torch.float16)
    insert_crop_into_image(placed, resampled.half(), properties["bbox_used_for_cropping"])
    inside = np.zeros(whole, bool)
    inside[tuple(slice(*sides) for sides in properties["bbox_used_for_cropping"])] = True
    back = plans.transpose_backward
    return placed.permute(0, *(axis + 1 for axis in back)), inside.transpose(back)


def is_picture(properties: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether a case (Z, Y, X) is a 2D image: one slice, from a file without a third axis."""
    sitk = properties.get("sitk_stuff")
    return shape[0] == 1 and "nibabel_stuff" not in properties and (sitk is None or len(sitk["spacing"]) == 2)


def has_orientation(properties: Mapping[str, Any]) -> bool:
    """Whether nnU-Net's reader knows the directions in the patient."""
    return "nibabel_stuff" in properties or len(properties.get("sitk_stuff", {}).get("spacing", ())) == 3


def input_geometry(properties: Mapping[str, Any]) -> Geometry:
    """Geometry of the input; with the spacing alone where the reader knows no more."""
    if not has_orientation(properties):
        return Geometry.of_affine(np.diag([*properties["spacing"][::-1], 1.0]))
    if "nibabel_stuff" in properties:
        known = properties["nibabel_stuff"]
        return Geometry.of_affine(np.asarray(known.get("reoriented_affine", known["original_affine"])))
    known = properties["sitk_stuff"]
    return Geometry.of_sitk(known["spacing"], known["origin"], known["direction"])


def in_file_order(
    volume: NDArray[Any], geometry: Geometry, properties: Mapping[str, Any]
) -> tuple[NDArray[Any], Geometry]:
    """Turn a volume (Z, Y, X, ...) and its geometry to the axes of the input file, for readers that turn images."""
    found = io_orientation(geometry.affine)
    if "reoriented_affine" in properties.get("nibabel_stuff", {}):
        wanted = io_orientation(np.asarray(properties["nibabel_stuff"]["original_affine"]))
    elif "original_orientation" in properties.get("sitk_stuff", {}):
        wanted = axcodes2ornt(tuple(properties["sitk_stuff"]["original_orientation"]))
    else:
        return volume, geometry
    change = ornt_transform(found, wanted)
    in_xyz = volume.transpose(2, 1, 0, *range(3, volume.ndim))
    turned = apply_orientation(in_xyz, change)
    affine = geometry.affine @ nibabel.orientations.inv_ornt_aff(change, in_xyz.shape[:3])
    return turned.transpose(2, 1, 0, *range(3, volume.ndim)), Geometry.of_affine(affine)
