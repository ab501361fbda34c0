"""From preprocessed voxels back to the input's: nnU-Net's own preprocessing taken there and back."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_cfcl.chromap.nifti import write_rgb_volume
from nnunet_cfcl.chromap.nnunet.case import has_orientation, in_file_order, input_geometry, is_picture, to_input_voxels
from tests.toy_dataset import plan


def plans_3d(transpose):
    content = plan()
    content["transpose_forward"] = transpose
    content["transpose_backward"] = [transpose.index(axis) for axis in range(3)]
    content["configurations"]["3d_fullres"] = {
        **content["configurations"]["2d"], "patch_size": [8, 8, 8], "spacing": [2.0, 1.0, 1.0],
        "median_image_size_in_voxels": [10.0, 20.0, 20.0]}
    return PlansManager(content)


@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1]])
def test_a_smooth_field_comes_back_to_where_it_was(transpose):
    plans = plans_3d(transpose)
    configuration = plans.get_configuration("3d_fullres")
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (12, 30, 26)), indexing="ij")
    image = (0.5 * z + 0.3 * y - 0.2 * x)[None].astype(np.float32) + 2
    image[:, :2] = image[:, :, :3] = 0  # nnU-Net crops zeros away
    spacing = {"spacing": [1.5, 0.8, 1.2]}
    description = {"channel_names": {"0": "noNorm"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    configuration.configuration["normalization_schemes"] = ["NoNormalization"]
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(image, None, spacing, plans, configuration, description)
    field = torch.from_numpy(data[0] - 2)
    found, inside = to_input_voxels(torch.stack([field, -field]).half(), properties, plans, configuration)
    assert found.shape == (2, 12, 30, 26) and found.dtype == torch.float16
    assert inside[2:, 3:].all() and not inside[:2].any() and not inside[:, :3].any()
    core = (slice(4, -2), slice(6, -3), slice(3, -3))
    expected = image[0][core] - 2
    assert np.abs(found[0].float().numpy()[core] - expected).max() < 0.03
    assert torch.equal(found[1], -found[0])
    assert (found[:, torch.from_numpy(~inside)] == 0).all()


def written_volume(folder, direction):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.int16))
    image.SetSpacing((0.7, 0.9, 2.5))
    image.SetOrigin((-12.0, 30.0, 7.0))
    image.SetDirection(direction)
    file = folder / "image_0000.nii.gz"
    sitk.WriteImage(image, str(file))
    return file


TURNED = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("direction", [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0), TURNED])
def test_whichever_reader_is_used_a_map_has_the_geometry_and_the_order_of_the_file(tmp_path, reader, direction):
    file = written_volume(tmp_path, direction)
    images, properties = reader().read_images([str(file)])
    colors = np.repeat(images[0].astype(np.uint8)[..., None], 3, -1)
    turned, geometry = in_file_order(colors, input_geometry(properties), properties)
    write_rgb_volume(tmp_path / "map.nii.gz", turned, geometry)
    source, found = sitk.ReadImage(str(file)), sitk.ReadImage(str(tmp_path / "map.nii.gz"))
    for name in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(source, name)(), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found)[..., 0], sitk.GetArrayFromImage(source))
    np.testing.assert_allclose(nibabel.load(tmp_path / "map.nii.gz").affine, nibabel.load(file).affine, atol=1e-5)


def test_only_an_image_without_a_third_axis_is_a_picture():
    assert is_picture({"spacing": (999, 1, 1)}, (1, 8, 8))
    assert is_picture({"sitk_stuff": {"spacing": (1.0, 1.0)}}, (1, 8, 8))
    assert not is_picture({"sitk_stuff": {"spacing": (1.0, 1.0, 4.0)}}, (1, 8, 8))
    assert not is_picture({"nibabel_stuff": {}}, (1, 8, 8))
    assert not is_picture({"spacing": (1, 1, 1)}, (3, 8, 8))


def test_of_an_image_without_orientation_the_spacing_is_known():
    picture = {"spacing": (999, 0.5, 0.25), "sitk_stuff": {"spacing": (0.25, 0.5), "origin": (0, 0), "direction": ()}}
    assert not has_orientation(picture) and not has_orientation({"spacing": (999, 1, 1)})
    np.testing.assert_array_equal(np.diag(input_geometry(picture).affine), [0.25, 0.5, 999, 1])
