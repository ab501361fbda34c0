"""Files of whole-number labels (masks, predictions), read by nnU-Net's own readers, with their geometry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray

from nnunet_cfcl.errors import UserError, foreign_errors_as

#: Reader for the files of an ending; natural images have no spacing of their own.
READERS = {**dict.fromkeys(NaturalImage2DIO.supported_file_endings, NaturalImage2DIO),
           **dict.fromkeys(SimpleITKIO.supported_file_endings, SimpleITKIO)}
#: More different values than this are an image, not labels.
MOST_LABELS = 1000
#: Headers are written with few digits: what may differ in spacing (relative), direction (cosine), origin (voxels).
SPACING, DIRECTION, ORIGIN = 1e-3, 1e-3, 1e-2


@dataclass(frozen=True)
class LabelFile:
    """One file's voxels and where they lie.

    Attributes:
        file: where it was read.
        labels: (Z, Y, X) int32, 0 or more; (1, Y, X) for a 2D image.
        spacing: of each axis in mm, the slowest first; for natural images 1 (pixel). An axis of one voxel has nnU-Net's
            stand-in.
        origin, direction: as SimpleITK gives them (x first); empty for natural images.
    """

    file: Path
    labels: NDArray[np.int32]
    spacing: tuple[float, ...]
    origin: tuple[float, ...] = ()
    direction: tuple[float, ...] = ()

    @property
    def in_pixels(self) -> bool:
        """Whether its spacing is in pixels, because such files hold no millimetres."""
        return not self.origin


def case_of(file_name: str) -> str | None:
    """The file's name without its ending; None where nnU-Net's readers read no such file, and for hidden files."""
    endings = [ending for ending in READERS if file_name.lower().endswith(ending)]
    if not endings or file_name.startswith("."):
        return None
    return file_name[: -len(max(endings, key=len))] or None


def read_label_file(file: Path) -> LabelFile:
    """Read labels with nnU-Net's reader for this ending.

    Args:
        file: one of which `case_of` knows the ending.

    Raises:
        UserError: it cannot be read, has several channels, or values that are no labels.
    """
    ending = max((one for one in READERS if file.name.lower().endswith(one)), key=len)
    def translate(error: Exception) -> UserError:
        reason = " ".join(str(error).split())[-200:] or type(error).__name__
        return UserError(f"{file} cannot be read as a mask ({reason})", "write it again")

    with foreign_errors_as(translate):
        voxels, properties = READERS[ending]().read_seg(str(file))
    if len(voxels) != 1:
        raise UserError(f"{file} has {len(voxels)} channels, expected one of whole-number labels", "write it as a mask "
                        "(for PNG: greyscale, not RGB)")
    _check_values(file, voxels)
    header = properties.get("sitk_stuff", {})
    return LabelFile(file, voxels[0].astype(np.int32), tuple(float(size) for size in properties["spacing"]),
                     tuple(header.get("origin", ())), tuple(header.get("direction", ())))


def _check_values(file: Path, voxels: NDArray[np.float32]) -> None:
    values = np.unique(voxels)
    wrong = values[~np.isfinite(values) | (values < 0) | (values != np.round(values))]
    if len(wrong):
        raise UserError(f"{file} has values that are no labels, such as {wrong[0]:g}; expected whole numbers from 0: "
                        "is it an image or a probability map?")
    if len(values) > MOST_LABELS:
        raise UserError(f"{file} has {len(values)} different values, expected at most {MOST_LABELS} labels: is it an "
                        "image?")


def geometry_difference(one: LabelFile, other: LabelFile) -> str:
    """What differs between the grids of two files, in words; "" where they agree.

    Returns:
        The first difference of shape, kind of spacing, spacing, direction and origin.
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
