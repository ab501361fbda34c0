"""Colour volumes and coordinates as files: SimpleITK and nibabel find every voxel where the image has it."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_cfcl.chromap.nifti import CENTRE, RGB24, Geometry, read_rgb_volume, write_embedding, write_rgb_volume

SHAPE = (4, 5, 6)


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    """Rotations about x, y and z, one after the other."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[b, a], turn[a, b] = np.sin(angle), -np.sin(angle)
        matrix = turn @ matrix
    return matrix


@pytest.fixture
def source(tmp_path) -> sitk.Image:
    """An oblique, anisotropic image as it is after SimpleITK wrote and read it."""
    image = sitk.GetImageFromArray(np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE))
    image.SetSpacing((0.7, 1.3, 4.5))
    image.SetOrigin((-31.5, 12.25, 87.0))
    image.SetDirection(rotation((12, -20, 35)).ravel().tolist())
    sitk.WriteImage(image, tmp_path / "source.nii.gz")
    return sitk.ReadImage(tmp_path / "source.nii.gz")


def geometry_of(image: sitk.Image) -> Geometry:
    return Geometry.of_sitk(image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def assert_same_place(found: sitk.Image, image: sitk.Image) -> None:
    assert found.GetSize() == image.GetSize()
    np.testing.assert_allclose(found.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(found.GetOrigin(), image.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(found.GetDirection(), image.GetDirection(), atol=1e-6)


def some_colors() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["colors.nii.gz", "colors.nii"])
def test_simpleitk_finds_colours_where_the_image_is(tmp_path, source, name):
    colors = some_colors()
    write_rgb_volume(tmp_path / name, colors, geometry_of(source))
    found = sitk.ReadImage(tmp_path / name)
    assert_same_place(found, source)
    assert found.GetPixelIDTypeAsString() == "vector of 8-bit unsigned integer"
    assert found[5, 0, 0] == tuple(colors[0, 0, 5]) and found[1, 2, 3] == tuple(colors[3, 2, 1])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), colors)


def test_nibabel_finds_colours_of_type_rgb24_where_the_image_is(tmp_path, source):
    colors = some_colors()
    write_rgb_volume(tmp_path / "colors.nii.gz", colors, geometry_of(source))
    found, image = nibabel.load(tmp_path / "colors.nii.gz"), nibabel.load(tmp_path / "source.nii.gz")
    assert found.get_data_dtype() == RGB24
    assert int(found.header["datatype"]) == 128 and int(found.header["bitpix"]) == 24
    assert tuple(found.dataobj[5, 4, 3]) == tuple(colors[3, 4, 5])
    for affine, code in (found.get_sform(coded=True), found.get_qform(coded=True)):
        np.testing.assert_allclose(affine, image.affine, atol=1e-5)
        assert code == 1
    assert found.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(read_rgb_volume(tmp_path / "colors.nii.gz"), colors)


def test_nibabels_affine_and_simpleitks_numbers_give_the_same_geometry(tmp_path, source):
    affine = nibabel.load(tmp_path / "source.nii.gz").affine
    np.testing.assert_allclose(geometry_of(source).affine, Geometry.of_affine(affine).affine, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "float32", "float64"])
def test_coordinates_are_two_components_of_a_voxel_and_zero_outside(tmp_path, source, precision):
    disc = np.random.default_rng(0).uniform(-0.7, 0.7, (2, *SHAPE)).astype(precision)
    expected = disc.astype(np.float32)
    disc[:, 0, 0, 0], disc[1, 0, 0, 1], expected[:, 0, 0, :2] = np.nan, np.nan, 0
    disc[:, 3, 4, 5], expected[:, 3, 4, 5] = 0, (CENTRE, 0)
    disc[0, 3, 4, 4] = expected[0, 3, 4, 4] = 0
    write_embedding(tmp_path / "disc.nii.gz", disc, geometry_of(source))
    found = sitk.ReadImage(tmp_path / "disc.nii.gz")
    assert_same_place(found, source)
    assert found.GetNumberOfComponentsPerPixel() == 2 and found.GetDimension() == 3
    np.testing.assert_array_equal(np.moveaxis(sitk.GetArrayFromImage(found), -1, 0), expected)
    read = nibabel.load(tmp_path / "disc.nii.gz")
    assert read.shape == (6, 5, 4, 1, 2) and read.get_data_dtype() == np.float32
    assert read.header.get_intent()[0] == "vector"
    np.testing.assert_array_equal(np.asarray(read.dataobj)[:, :, :, 0].T, expected)
    np.testing.assert_allclose(read.affine, nibabel.load(tmp_path / "source.nii.gz").affine, atol=1e-5)


def test_arrays_that_are_views_are_written_as_they_look(tmp_path, source):
    colors, disc = some_colors(), np.random.default_rng(0).uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    write_rgb_volume(tmp_path / "colors.nii.gz", np.asfortranarray(colors)[::-1, :, ::-1], geometry_of(source))
    np.testing.assert_array_equal(read_rgb_volume(tmp_path / "colors.nii.gz"), colors[::-1, :, ::-1])
    write_embedding(tmp_path / "disc.nii.gz", np.moveaxis(np.moveaxis(disc, 0, -1).copy(), -1, 0), geometry_of(source))
    found = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "disc.nii.gz"))
    np.testing.assert_array_equal(np.moveaxis(found, -1, 0), disc)


def test_files_are_the_same_whenever_they_are_written_and_nothing_else_is_left(tmp_path, source):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_rgb_volume(tmp_path / folder / "colors.nii.gz", some_colors(), geometry_of(source))
        assert [file.name for file in (tmp_path / folder).iterdir()] == ["colors.nii.gz"]
    first, second = ((tmp_path / folder / "colors.nii.gz").read_bytes() for folder in ("a", "b"))
    assert first == second


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, source, monkeypatch):
    write_rgb_volume(tmp_path / "colors.nii.gz", some_colors(), geometry_of(source))
    before = (tmp_path / "colors.nii.gz").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("nnunet_cfcl.chromap.nifti.Nifti1Image.to_stream", fail)
    with pytest.raises(OSError, match="disk full"):
        write_rgb_volume(tmp_path / "colors.nii.gz", np.zeros((*SHAPE, 3), np.uint8), geometry_of(source))
    assert (tmp_path / "colors.nii.gz").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["colors.nii.gz", "source.nii.gz"]


def test_arrays_and_names_that_do_not_fit_are_refused(tmp_path, source):
    geometry = geometry_of(source)
    with pytest.raises(ValueError, match="uint8, found"):
        write_rgb_volume(tmp_path / "a.nii.gz", np.zeros((*SHAPE, 3), np.float32), geometry)
    with pytest.raises(ValueError, match=r"\(Z, Y, X, 3\)"):
        write_rgb_volume(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.uint8), geometry)
    with pytest.raises(ValueError, match=r"\(2, Z, Y, X\)"):
        write_embedding(tmp_path / "a.nii.gz", np.zeros((3, *SHAPE)), geometry)
    with pytest.raises(ValueError, match="ends in .nii.gz or .nii, found a.png"):
        write_rgb_volume(tmp_path / "a.png", some_colors(), geometry)
    with pytest.raises(ValueError, match="is no colour volume"):
        read_rgb_volume(tmp_path / "source.nii.gz")
    with pytest.raises(ValueError, match="last row"):
        Geometry.of_affine(np.ones((4, 4)))
    with pytest.raises(ValueError, match="three directions"):
        Geometry.of_affine(np.diag((1, 1, 0, 1)))
    with pytest.raises(ValueError, match="of a 3D image"):
        Geometry.of_sitk((1, 1), (0, 0), (1, 0, 0, 1))


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "ASL", "SRP"])
def test_an_array_is_turned_so_that_its_axes_run_to_superior_posterior_and_left(codes):
    towards = {"L": (0, -1), "R": (0, 1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.diag((0.0, 0.0, 0.0, 1.0))
    for axis, code in enumerate(codes):
        row, sign = towards[code]
        affine[row, axis] = 2 * sign
    geometry = Geometry.of_affine(affine)
    order, reversed_ = geometry.axes_towards_lps()
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (3, 4, 5)), indexing="ij"), -1)[..., ::-1]
    patient = index @ affine[:3, :3].T
    turned = np.flip(patient.transpose(*order, 3), [axis for axis in range(3) if reversed_[axis]])
    for axis, (coordinate, sign) in enumerate([(2, 1), (1, -1), (0, -1)]):
        steps = np.diff(turned, axis=axis).reshape(-1, 3)
        expected = np.zeros(3)
        expected[coordinate] = 2 * sign
        np.testing.assert_array_equal(steps, np.broadcast_to(expected, steps.shape))


def test_colours_of_a_real_image_lie_on_it(tmp_path, real_images):
    file = sorted((real_images / "Dataset004_Hippocampus" / "imagesTr").glob("*.nii.gz"))[0]
    image = sitk.ReadImage(file)
    colors = np.repeat(sitk.GetArrayFromImage(image)[..., None].astype(np.uint8), 3, -1)
    write_rgb_volume(tmp_path / "colors.nii.gz", colors, geometry_of(image))
    found = sitk.ReadImage(tmp_path / "colors.nii.gz")
    assert_same_place(found, image)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), colors)
