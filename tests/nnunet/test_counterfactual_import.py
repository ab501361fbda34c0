"""Importing counterfactuals: the original images themselves must come out as nnU-Net preprocessed them."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from skimage import io

from nnunet_cfcl.counterfactual import find_store
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.counterfactual_import import add_counterfactuals_parser, import_counterfactuals

pytestmark = pytest.mark.end_to_end

VOLUMES, XRAYS = "Dataset801_Volumes", "Dataset802_Xrays"
CONFIGURATIONS = [(VOLUMES, "3d_fullres"), (VOLUMES, "2d"), (XRAYS, "2d")]
CASES = ["patient_0", "odd__patient", "patient_2"]


def write_volume(path: Path, array: np.ndarray, spacing: tuple[float, ...]) -> None:
    """``array`` (z, y, x) as NIfTI; ``spacing`` in the file's order x, y, z."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def make_volumes(raw: Path) -> None:
    """Anisotropic volumes with thick slices along x and a wide border of zeros: transposed, masked, resampled."""
    random = np.random.default_rng(0)
    for index, case in enumerate(CASES):
        shape = (28, 30 + index, 12)
        volume, label = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
        inner = (slice(6, 22), slice(7, 24), slice(2, 10))
        volume[inner] = 100 + 40 * random.random(volume[inner].shape)
        volume[8, 8, 4] = 0
        label[10:16, 11:17, 4:8] = 1
        spacing = (3.0 + 0.3 * index, 1.0, 1.0 + 0.2 * index)
        write_volume(raw / "imagesTr" / f"{case}_0000.nii.gz", volume, spacing)
        write_volume(raw / "labelsTr" / f"{case}.nii.gz", label, spacing)


def make_xrays(raw: Path) -> None:
    """Two-dimensional images without a border: neither cropped nor masked nor resampled."""
    random = np.random.default_rng(1)
    for case in CASES:
        label = np.zeros((40, 36), np.uint8)
        label[10:20, 10:25] = 1
        io.imsave(raw / "imagesTr" / f"{case}_0000.png", random.integers(1, 255, label.shape).astype(np.uint8))
        io.imsave(raw / "labelsTr" / f"{case}.png", label, check_contrast=False)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Both datasets, planned and preprocessed by nnU-Net's own command; the folder of nnUNet_raw and its siblings."""
    base = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(variable, str(base / variable))
        for name, make, ending in ((VOLUMES, make_volumes, ".nii.gz"), (XRAYS, make_xrays, ".png")):
            raw = base / "nnUNet_raw" / name
            for folder in ("imagesTr", "labelsTr"):
                (raw / folder).mkdir(parents=True)
            make(raw)
            description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1},
                           "numTraining": len(CASES), "file_ending": ending}
            (raw / "dataset.json").write_text(json.dumps(description))
            configurations = [configuration for dataset, configuration in CONFIGURATIONS if dataset == name]
            command = [str(Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")), "-d", name[7:10],
                       "-npfp", "1", "-c", *configurations, "-np", *["1"] * len(configurations)]
            subprocess.run(command, check=True, env=dict(os.environ), capture_output=True, timeout=600)
        yield base


def preprocessed_folder(base: Path, dataset: str, configuration: str) -> Path:
    return base / "nnUNet_preprocessed" / dataset / f"nnUNetPlans_{configuration}"


def offer(base: Path, dataset: str, folder: Path, interventions=("same",)) -> Path:
    """The original images as counterfactuals of themselves in ``folder``."""
    folder.mkdir(exist_ok=True)
    for path in (base / "nnUNet_raw" / dataset / "imagesTr").iterdir():
        case, ending = path.name.split("_0000")
        for name in interventions:
            shutil.copy(path, folder / f"{case}__{name}_0000{ending}")
    return folder


@pytest.mark.parametrize(("dataset", "configuration"), CONFIGURATIONS)
def test_the_originals_as_counterfactuals_give_the_preprocessed_data(datasets, tmp_path, dataset, configuration):
    images = offer(datasets, dataset, tmp_path / "images")
    store = import_counterfactuals(dataset, configuration, images, store_folder=tmp_path / "store")
    originals = nnUNetDatasetBlosc2(str(preprocessed_folder(datasets, dataset, configuration)))
    assert sorted(originals.identifiers) == sorted(CASES)
    for case in CASES:
        data = originals.load_case(case)[0]
        np.testing.assert_allclose(store.read(case, "same"), data[:], atol=1e-6, rtol=0)
        assert store._open_array(case, "same").chunks == data.chunks
        assert store._open_array(case, "same").blocks == data.blocks


def test_the_datasets_exercise_transposing_cropping_masked_normalisation_and_resampling(datasets):
    plan = json.loads((datasets / "nnUNet_preprocessed" / VOLUMES / "nnUNetPlans.json").read_text())
    assert plan["transpose_forward"] == [2, 0, 1]
    assert plan["configurations"]["3d_fullres"]["use_mask_for_norm"] == [True]
    folder = preprocessed_folder(datasets, VOLUMES, "3d_fullres")
    data, _, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case("patient_2")
    assert tuple(properties["shape_before_cropping"]) == (12, 28, 32)
    assert tuple(properties["shape_after_cropping_and_before_resampling"]) == (8, 16, 17) != data.shape[1:]


def test_a_counterfactual_is_normalised_by_its_own_statistics(datasets, tmp_path):
    images = offer(datasets, VOLUMES, tmp_path / "images")
    path = images / "patient_0__same_0000.nii.gz"
    volume = sitk.ReadImage(str(path))
    changed = sitk.GetArrayFromImage(volume)
    changed = np.where(changed > 0, 3 * changed + 50, 0).astype(np.float32)
    write_volume(path, changed, volume.GetSpacing())
    store = import_counterfactuals(VOLUMES, "3d_fullres", images, store_folder=tmp_path / "store")
    original = nnUNetDatasetBlosc2(str(preprocessed_folder(datasets, VOLUMES, "3d_fullres"))).load_case("patient_0")[0]
    # the one voxel inside that is 0 belongs to the original's filled mask; everything else is an affine change
    difference = np.abs(store.read("patient_0", "same") - original[:])
    assert np.median(difference) < 0.05


def test_the_command_imports_several_interventions_into_the_store_training_finds(datasets, tmp_path, capsys):
    images = offer(datasets, XRAYS, tmp_path / "images", ("vendorB", "low_field"))
    parser = argparse.ArgumentParser()
    add_counterfactuals_parser(parser.add_subparsers())
    arguments = parser.parse_args(
        ["counterfactuals", "import", "-d", "802", "-c", "2d", "-i", str(images), "-np", "2"])
    assert arguments.run(arguments) == 0
    folder = find_store(preprocessed_folder(datasets, XRAYS, "2d"))
    assert folder is not None
    assert f"{folder}: interventions low_field, vendorB" in capsys.readouterr().out
    shutil.rmtree(folder.parent)


def test_a_repeated_import_makes_only_what_is_missing_or_out_of_date(datasets, tmp_path):
    images = offer(datasets, XRAYS, tmp_path / "images")
    store = import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store")
    stamps = {case: store.path(case, "same").stat().st_mtime_ns for case in CASES}
    store.path("patient_0", "same").unlink()
    changed = images / "patient_2__same_0000.png"
    os.utime(changed, ns=(stamps["patient_2"] + 10**9, stamps["patient_2"] + 10**9))
    import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store")
    assert store.path("odd__patient", "same").stat().st_mtime_ns == stamps["odd__patient"]
    assert store.path("patient_0", "same").stat().st_mtime_ns > stamps["patient_0"]
    assert store.path("patient_2", "same").stat().st_mtime_ns > stamps["patient_2"]


def test_wrong_input_is_named_before_anything_is_written(datasets, tmp_path):
    images = offer(datasets, XRAYS, tmp_path / "images")
    attempt = lambda dataset=XRAYS, configuration="2d", folder=images: import_counterfactuals(  # noqa: E731
        dataset, configuration, folder, store_folder=tmp_path / "store")
    with pytest.raises(UserError, match="no single dataset '899'"):
        attempt(dataset="899")
    with pytest.raises(UserError, match="has the configurations 2d; found '3d_fullres'"):
        attempt(configuration="3d_fullres")
    with pytest.raises(UserError, match=r"no files CASE__INTERVENTION_0000\.png"):
        attempt(folder=tmp_path)
    io.imsave(images / "nobody__same_0000.png", np.eye(40, dtype=np.uint8), check_contrast=False)
    with pytest.raises(UserError, match="1 cases that are not in .*: nobody"):
        attempt()
    (images / "nobody__same_0000.png").rename(images / "patient_0__other_0000.png")
    with pytest.raises(UserError, match="lacks 2 counterfactuals: odd__patient__other, patient_2__other"):
        attempt()
    (images / "patient_0__other_0000.png").rename(images / "patient_0__other.png")
    with pytest.raises(UserError, match="must be named CASE__INTERVENTION_0000"):
        attempt()


def test_an_image_on_another_grid_is_an_error_with_both_shapes(datasets, tmp_path):
    images = offer(datasets, XRAYS, tmp_path / "images")
    io.imsave(images / "patient_2__same_0000.png", np.eye(40, dtype=np.uint8), check_contrast=False)
    with pytest.raises(UserError, match=r"'same' of case patient_2 has shape \(1, 1, 40, 40\).*\(1, 1, 40, 36\)"):
        import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store")


def test_an_image_that_is_not_finite_after_normalisation_is_refused(datasets, tmp_path):
    images = offer(datasets, VOLUMES, tmp_path / "images")
    path = images / "patient_0__same_0000.nii.gz"
    volume = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(volume)
    array[array > 0] = 3e38  # the mean overflows float32; ITK itself replaces NaN by 0 as it reads
    write_volume(path, array, volume.GetSpacing())
    with pytest.raises(UserError, match="'same' of case patient_0 .* is not finite"):
        import_counterfactuals(VOLUMES, "3d_fullres", images, store_folder=tmp_path / "store")
