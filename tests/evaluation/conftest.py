"""Fixtures that write masks."""

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io


@pytest.fixture
def write_mask():
    """Factory: (file, array (Z, Y, X) or (Y, X), spacing (z, y, x) in mm, origin (x, y, z)) writes a mask."""

    def write(file, labels, spacing=None, origin=None):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            io.imsave(str(file), labels.astype(np.uint8), check_contrast=False)
            return file
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing([float(size) for size in (spacing or (1.0,) * labels.ndim)][::-1])
        image.SetOrigin(origin or (0.0,) * labels.ndim)
        sitk.WriteImage(image, str(file))
        return file

    return write


@pytest.fixture
def box():
    """Factory: (first index per axis, side, shape, label) -> uint8 array with a cube of the label."""

    def make(first, side=4, shape=(8, 12, 12), label=1):
        labels = np.zeros(shape, np.uint8)
        labels[tuple(slice(start, start + side) for start in first)] = label
        return labels

    return make
