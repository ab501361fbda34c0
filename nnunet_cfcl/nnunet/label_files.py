"""Reader of label files (masks, predictions) and their geometry, through nnU-Net's own image readers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray

from nnunet_cfcl.errors import UserError, foreign_errors_as

#: File ending -> nnU-Net's reader; natural images have no spacing.
READERS = {**dict.fromkeys(NaturalImage2DIO.supported_file_endings, NaturalImage2DIO),
           **dict.fromkeys(SimpleITKIO.supported_file_endings, SimpleITKIO)}
#: A file with more different values than this is an image, not a mask.
MOST_LABELS = 1000
#: Tolerances for rounded headers: spacing (relative), direction (cosine), origin (voxels).
SPACING, DIRECTION, ORIGIN = 1e-3, 1e-3, 1e-2


@dataclass(frozen=True)
class LabelFile:
    """Labels and geometry of one file.

    Attributes:
        file: path of the file.
        labels: (Z, Y, X) int32, non-negative; (1, Y, X) for a 2D image.
        spacing: voxel size per axis (Z, Y, X) in mm; 1 (pixel) for natural images. nnU-Net's reader sets a placeholder
            for the missing axis of a 2D image.
        origin, direction: geometry in SimpleITK's order (x first); empty for natural images.
    """

    file: Path
    labels: NDArray[np.int32]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()

    @property
    def in_pixels(self) -> bool:
        """Whether the spacing is in pixels, as for natural images, which store no millimetres."""
        return not self.origin


def case_of(file_name: str) -> str | None:
    """File name without its ending; None for hidden files and endings that nnU-Net's readers do not support."""
    endings = [ending for ending in READERS if file_name.lower().endswith(ending)]
    if not endings or file_name.startswith("."):
        return None
    return file_name[: -len(max(endings, key=len))] or None


def read_label_file(file: Path) -> LabelFile:
    """Read a label file with nnU-Net's reader for its ending.

    Args:
        file: file whose ending `case_of` supports.

    Raises:
        UserError: the file cannot be read, has several channels, or values that are not labels.
    """
    ending = max((known for known in READERS if file.name.lower().endswith(known)), key=len)

    def translate(error: Exception) -> UserError:
        reason = " ".join(str(error).split())[-200:] or type(error).__name__
        return UserError(f"{file} cannot be read as a mask ({reason})", "export the mask again")

    with foreign_errors_as(translate):
        voxels, properties = READERS[ending]().read_seg(str(file))
    if len(voxels) != 1:
        raise UserError(f"{file} has {len(voxels)} channels, expected one channel of integer labels",
                        "export it as a mask (PNG: greyscale, not RGB)")
    _check_values(file, voxels)
    header = properties.get("sitk_stuff", {})
    return LabelFile(file, voxels[0].astype(np.int32), tuple(float(size) for size in properties["spacing"]),
                     tuple(header.get("origin", ())), tuple(header.get("direction", ())))


def _check_values(file: Path, voxels: NDArray[np.float32]) -> None:
    values = np.unique(voxels)
    wrong = values[~np.isfinite(values) | (values < 0) | (values != np.round(values))]
    if len(wrong):
        raise UserError(f"{file} has values that are not labels, such as {wrong[0]:g}, expected non-negative integers",
                        "use a mask, not an image or a probability map")
    if len(values) > MOST_LABELS:
        raise UserError(f"{file} has {len(values)} different values, expected at most {MOST_LABELS} labels",
                        "use a mask, not an image")


def geometry_difference(one: LabelFile, other: LabelFile) -> str:
    """Describe the difference between the grids of two files; "" where they agree.

    Returns:
        The first difference among shape, unit of spacing, spacing, direction and origin.
    """
    if one.labels.shape != other.labels.shape:
        return f"shapes {one.labels.shape} and {other.labels.shape}"
    if one.in_pixels != other.in_pixels:
        return "one has a spacing in mm, the other only pixels"
    if not np.allclose(one.spacing, other.spacing, rtol=SPACING, atol=0):
        return f"spacings {_rounded(one.spacing)} and {_rounded(other.spacing)} mm"
    if not np.allclose(one.direction, other.direction, rtol=0, atol=DIRECTION):
        return f"directions {_rounded(one.direction)} and {_rounded(other.direction)}"
    if not np.allclose(one.origin, other.origin, rtol=0, atol=ORIGIN * min(one.spacing)):
        return f"origins {_rounded(one.origin)} and {_rounded(other.origin)} mm"
    return ""


def _rounded(numbers: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{number:.6g}" for number in numbers) + ")"
