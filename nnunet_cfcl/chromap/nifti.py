"""Colour volumes and plane coordinates as NIfTI files that lie on their image in any viewer.

NIfTI stores the first axis fastest, the components of a colour even faster, those of a vector slowest. Arrays
(Z, Y, X, 3) and (2, Z, Y, X) in C order are thus already the bytes of the file: only the header is made by nibabel, and
the data are compressed slice by slice, without a copy of the volume.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header
from numpy.typing import ArrayLike, NDArray

from nnunet_cfcl.files.atomic import replace_atomically

#: What nibabel calls data type RGB24 (code 128).
RGB24 = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
#: Where the centre of the disc is written to, in disc radii: (0, 0) means that a voxel has no coordinates.
CENTRE = 1e-6
#: What zlib calls the largest window with gzip's header and check sum.
GZIP = 31
#: qform and sform are both the scanner's coordinates, as SimpleITK says of what it writes.
SCANNER = 1


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a volume are in the patient.

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
        """From nibabel's affine (4, 4), RAS in mm, of an array (X, Y, Z)."""
        return cls(np.array(affine, dtype=np.float64))

    @classmethod
    def of_sitk(cls, spacing: Sequence[float], origin: Sequence[float], direction: Sequence[float]) -> Geometry:
        """From what SimpleITK says of a 3D image.

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
        """How an array (Z, Y, X) is turned so that Z runs to superior, Y to posterior, X to left, as nearly as it can.

        Returns:
            for each of the axes (Z, Y, X) of the turned array the axis of the array that becomes it, and whether that
            one is reversed.
        """
        towards = nibabel.orientations.axcodes2ornt("LPS")
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(self.affine), towards)
        # the rows of turn are the array's x, y, z; those of an array (Z, Y, X) come in reverse
        source = {2 - int(to): (2 - number, flip < 0) for number, (to, flip) in enumerate(turn)}
        return tuple(source[axis][0] for axis in range(3)), tuple(bool(source[axis][1]) for axis in range(3))


def write_rgb_volume(file: str | os.PathLike[str], colors: NDArray[np.uint8], geometry: Geometry) -> None:
    """Write colours as NIfTI of data type RGB24, which ITK-SNAP and 3D Slicer open as a colour image; atomically.

    Args:
        file: ends in .nii.gz or .nii.
        colors: (Z, Y, X, 3) uint8.
        geometry: of the image that is coloured.

    Raises:
        ValueError: another shape, data type or file ending.
    """
    if colors.ndim != 4 or colors.shape[-1] != 3 or colors.dtype != np.uint8:
        raise ValueError(f"expected colours (Z, Y, X, 3) uint8, found {colors.shape} {colors.dtype}")
    header = _header(RGB24, colors.shape[2::-1], geometry)
    _write(Path(file), header, colors)


def write_embedding(file: str | os.PathLike[str], disc: NDArray[np.floating], geometry: Geometry) -> None:
    """Write coordinates in the unit disc as NIfTI of two float32 components per voxel; atomically.

    SimpleITK reads a 3D vector image of two components, nibabel an array (X, Y, Z, 1, 2): the fifth dimension is where
    the NIfTI-1 standard wants vectors, marked by the intent code 1007. Voxels that have no coordinates (NaN) are
    written as exactly (0, 0): SimpleITK would read NaN as 0, nibabel as NaN. A voxel in the very centre of the disc is
    written as (`CENTRE`, 0), so that all voxels but those without coordinates differ from (0, 0).

    Args:
        file: ends in .nii.gz or .nii.
        disc: (2, Z, Y, X) of any float type, in [-1, 1], NaN outside; first x (to the right in the wheel), then y (up).
        geometry: of the image.

    Raises:
        ValueError: another shape, data type or file ending.
    """
    if disc.ndim != 4 or len(disc) != 2 or not np.issubdtype(disc.dtype, np.floating):
        raise ValueError(f"expected floating-point coordinates (2, Z, Y, X), found {disc.shape} {disc.dtype}")
    header = _header(np.dtype("<f4"), (*disc.shape[:0:-1], 1, 2), geometry)
    header.set_intent("vector", name="CHRO-map disc")
    # the range that viewers show at first
    header["cal_min"], header["cal_max"] = -1, 1
    _write(Path(file), header, (_stored(disc[:, z], axis) for axis in range(2) for z in range(disc.shape[1])))


def read_rgb_volume(file: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Colours (Z, Y, X, 3) uint8 of a NIfTI file of data type RGB24.

    Raises:
        ValueError: the file holds something else.
    """
    volume = np.asanyarray(nibabel.nifti1.Nifti1Image.from_filename(file).dataobj)
    if volume.dtype != RGB24 or volume.ndim != 3:
        raise ValueError(f"{file} is no colour volume: {volume.ndim} dimensions of {volume.dtype}")
    turned = np.ascontiguousarray(volume.T)
    return turned.view(np.uint8).reshape(*turned.shape, 3)


def _stored(place: NDArray[np.floating], axis: int) -> NDArray[np.float32]:
    """One component of a slice (2, Y, X) as it is written."""
    both = place.astype(np.float32)
    if axis == 0:
        both[0, (both == 0).all(0)] = CENTRE
    both[:, np.isnan(both).any(0)] = 0
    return both[axis]


def _header(kind: np.dtype, shape: Sequence[int], geometry: Geometry) -> Nifti1Header:
    header = Nifti1Header(endianness="<")
    header.set_data_dtype(kind)
    header.set_data_shape(shape)
    header.set_qform(geometry.affine, code=SCANNER)
    header.set_sform(geometry.affine, code=SCANNER)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header.set_data_offset(Nifti1Header.single_vox_offset)
    return header


def _write(file: Path, header: Nifti1Header, parts: Iterable[NDArray]) -> None:
    """Header, then the parts in the header's data type, each in C order."""
    if not file.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"expected a name that ends in .nii.gz or .nii, found {file.name}")

    def write(temporary: Path) -> None:
        # the temporary name ends in .tmp: nibabel would not know by it what to write
        with open(temporary, "wb") as handle:
            if file.name.endswith(".gz"):
                # of what zlib offers, run lengths are fastest: colours outside are constant, and noise elsewhere has no
                # repetitions to look for, so that files are as large as after six times the work
                packer = zlib.compressobj(1, zlib.DEFLATED, GZIP, strategy=zlib.Z_RLE)
                handle.writelines(packer.compress(part) for part in _bytes(header, parts))
                handle.write(packer.flush())
            else:
                handle.writelines(_bytes(header, parts))

    replace_atomically(file, write)


def _bytes(header: Nifti1Header, parts: Iterable[NDArray]) -> Iterator[bytes | memoryview]:
    # four zeros: no extensions follow
    yield header.binaryblock + bytes(4)
    kind = np.dtype(np.uint8) if header.get_data_dtype() == RGB24 else header.get_data_dtype()
    for part in parts:
        yield np.ascontiguousarray(part, dtype=kind).data.cast("B")
