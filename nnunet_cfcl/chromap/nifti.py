"""Colour volumes and plane coordinates as NIfTI files that lie on their image in any viewer.

Written by nibabel: SimpleITK has no pixel type RGB and would write colours as vectors (data type uint8, intent 1007),
which viewers do not show in colour.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Image
from numpy.typing import ArrayLike, NDArray

from nnunet_cfcl.files.atomic import replace_atomically

#: nibabel's structured type for the data type RGB24 (code 128).
RGB24 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
#: Stored place of a voxel in the centre of the disc, in disc radii: (0, 0) means that a voxel has no coordinates.
CENTRE = 1e-6
#: Code of qform and sform for coordinates of the scanner, as SimpleITK writes it.
SCANNER = 1


@dataclass(frozen=True, eq=False)
class Geometry:
    """Position of the voxels of a volume in the patient.

    Attributes:
        affine: (4, 4) float64, index (x, y, z) of a voxel -> its centre in mm, towards right, anterior, superior (RAS).

    Raises:
        ValueError: not a finite, invertible affine matrix.
    """

    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        matrix = self.affine
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.array_equal(matrix[3], (0, 0, 0, 1)):
            raise ValueError(f"expected a finite affine matrix (4, 4) with last row 0 0 0 1, found\n{matrix}")
        if np.linalg.matrix_rank(matrix[:3, :3]) < 3:
            raise ValueError(f"the axes of the image must point in three directions, found\n{matrix}")

    @classmethod
    def of_affine(cls, affine: ArrayLike) -> Geometry:
        """Geometry of an array (X, Y, Z) with nibabel's affine (4, 4), RAS in mm."""
        return cls(np.array(affine, dtype=np.float64))

    @classmethod
    def of_sitk(cls, spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]) -> Geometry:
        """Geometry of a 3D image of SimpleITK.

        Args:
            spacing: (x, y, z) in mm.
            origin: (x, y, z) in mm, towards left, posterior, superior (LPS).
            direction: 9 numbers, rows of a matrix whose columns are the axes of the image in LPS.
        """
        if (len(spacing), len(origin), len(direction)) != (3, 3, 9):
            raise ValueError(f"expected 3, 3 and 9 numbers of a 3D image, found {spacing}, {origin}, {direction}")
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing, dtype=np.float64)
        affine[:3, 3] = origin
        return cls(np.diag((-1.0, -1.0, 1.0, 1.0)) @ affine)

    def axes_towards_lps(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Order and direction of axes that turn an array (Z, Y, X) so that Z runs to superior, Y to posterior, X to
        left, as nearly as possible.

        Returns:
            for each of the axes (Z, Y, X) of the turned array the axis of the array that becomes it, and whether it is
            reversed.
        """
        towards = nibabel.orientations.axcodes2ornt("LPS")
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(self.affine), towards)
        # the rows of turn are the array's x, y, z; those of an array (Z, Y, X) come in reverse
        source = {2 - int(to): (2 - number, flip < 0) for number, (to, flip) in enumerate(turn)}
        return tuple(source[axis][0] for axis in range(3)), tuple(bool(source[axis][1]) for axis in range(3))


def write_rgb_volume(file: str | os.PathLike[str], colors: NDArray[np.uint8], geometry: Geometry) -> None:
    """Write colours as NIfTI of data type RGB24, which ITK-SNAP and 3D Slicer open as a colour image; atomically.

    Args:
        file: path that ends in .nii.gz or .nii.
        colors: (Z, Y, X, 3) uint8.
        geometry: geometry of the image that is coloured.

    Raises:
        ValueError: another shape, data type or file ending.
    """
    if colors.ndim != 4 or colors.shape[-1] != 3 or colors.dtype != np.uint8:
        raise ValueError(f"expected colours (Z, Y, X, 3) uint8, found {colors.shape} {colors.dtype}")
    voxels = np.ascontiguousarray(colors).view(RGB24)[..., 0].T
    _write(Path(file), _image(voxels, geometry))


def write_embedding(file: str | os.PathLike[str], disc: NDArray[np.floating], geometry: Geometry) -> None:
    """Write coordinates in the unit disc as NIfTI of two float32 components per voxel; atomically.

    SimpleITK reads a 3D vector image of two components, nibabel an array (X, Y, Z, 1, 2): the NIfTI-1 standard has the
    components of vectors in the fifth dimension, marked by the intent code 1007. Voxels without coordinates (NaN) are
    written as exactly (0, 0): SimpleITK would read NaN as 0, nibabel as NaN. A voxel in the very centre of the disc is
    written as (`CENTRE`, 0), so that all voxels but those without coordinates differ from (0, 0).

    Args:
        file: path that ends in .nii.gz or .nii.
        disc: (2, Z, Y, X) of any float type, in [-1, 1], NaN outside; first x (to the right in the wheel), then y (up).
        geometry: geometry of the image.

    Raises:
        ValueError: another shape, data type or file ending.
    """
    if disc.ndim != 4 or len(disc) != 2 or not np.issubdtype(disc.dtype, np.floating):
        raise ValueError(f"expected floating-point coordinates (2, Z, Y, X), found {disc.shape} {disc.dtype}")
    stored = disc.astype(np.float32)
    stored[0, (stored == 0).all(0)] = CENTRE
    stored[:, np.isnan(stored).any(0)] = 0
    image = _image(stored.transpose(3, 2, 1, 0)[:, :, :, None], geometry)
    image.header.set_intent("vector", name="CHRO-map disc")
    # the range that viewers show at first
    image.header["cal_min"], image.header["cal_max"] = -1, 1
    _write(Path(file), image)


def read_rgb_volume(file: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read colours (Z, Y, X, 3) uint8 from a NIfTI file of data type RGB24.

    Raises:
        ValueError: the file holds something else.
    """
    volume = np.asanyarray(nibabel.nifti1.Nifti1Image.from_filename(file).dataobj)
    if volume.dtype != RGB24 or volume.ndim != 3:
        raise ValueError(f"{file} is no colour volume: {volume.ndim} dimensions of {volume.dtype}")
    turned = np.ascontiguousarray(volume.T)
    return turned.view(np.uint8).reshape(*turned.shape, 3)


def _image(voxels: NDArray, geometry: Geometry) -> Nifti1Image:
    image = Nifti1Image(voxels, geometry.affine)
    image.set_qform(geometry.affine, code=SCANNER)
    image.set_sform(geometry.affine, code=SCANNER)
    image.header.set_xyzt_units("mm")
    return image


def _write(file: Path, image: Nifti1Image) -> None:
    if not file.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"expected a name that ends in .nii.gz or .nii, found {file.name}")

    def write(temporary: Path) -> None:
        # the temporary name ends in .tmp, from which nibabel would not know the format
        with open(temporary, "wb") as handle:
            if file.name.endswith(".gz"):
                # neither name nor time: the same image is always the same file
                with GzipFile("", "wb", compresslevel=1, fileobj=handle, mtime=0) as packed:
                    image.to_stream(packed)
            else:
                image.to_stream(handle)

    replace_atomically(file, write)
