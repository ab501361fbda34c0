"""Import of counterfactuals: the original images must be preprocessed exactly as by nnU-Net."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from skimage import io

from nnunet_cfcl.cli.counterfactuals import add_counterfactuals_parser, import_counterfactuals
from nnunet_cfcl.counterfactual import find_store
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.pool.manifest import pool_folder
from nnunet_cfcl.data.pool.run import preprocess_pool
from nnunet_cfcl.errors import UserError
from tests.planning import plan_and_preprocess

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
        plan_and_preprocess({VOLUMES: ["3d_fullres", "2d"], XRAYS: ["2d"]}, os.environ)
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


def test_a_killed_process_raises_a_clear_error(datasets, tmp_path, kill_first_child):
    images = offer(datasets, XRAYS, tmp_path / "images")
    with kill_first_child, pytest.raises(UserError, match="a process was killed, probably for lack of memory.*"
                                                          "smaller -np"):
        import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store", processes=2)


def test_a_repeated_import_writes_only_missing_and_outdated_files(datasets, tmp_path):
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


def test_invalid_input_raises_before_anything_is_written(datasets, tmp_path):
    images = offer(datasets, XRAYS, tmp_path / "images")
    attempt = lambda dataset=XRAYS, configuration="2d", folder=images: import_counterfactuals(  # noqa: E731
        dataset, configuration, folder, store_folder=tmp_path / "store")
    with pytest.raises(UserError, match="no unique dataset '899'"):
        attempt(dataset="899")
    with pytest.raises(UserError, match="has the configurations 2d, found '3d_fullres'"):
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


def test_an_image_that_is_not_finite_after_normalisation_raises(datasets, tmp_path):
    images = offer(datasets, VOLUMES, tmp_path / "images")
    path = images / "patient_0__same_0000.nii.gz"
    volume = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(volume)
    array[array > 0] = 3e38  # the mean overflows float32; ITK itself replaces NaN by 0 as it reads
    write_volume(path, array, volume.GetSpacing())
    with pytest.raises(UserError, match="'same' of case patient_0 .* is not finite"):
        import_counterfactuals(VOLUMES, "3d_fullres", images, store_folder=tmp_path / "store")


# --- the pool


@pytest.fixture
def make_pool(datasets):
    """A function that makes two training images of a dataset its pool, without and with a silver label, and
    preprocesses it; the pool is gone afterwards."""
    made = []

    def make(dataset: str, configuration: str) -> Path:
        raw, folder = datasets / "nnUNet_raw" / dataset, preprocessed_folder(datasets, dataset, configuration)
        made.append((raw, folder))
        for name in ("imagesUn", "labelsSilver"):
            (raw / name).mkdir()
        for source, case in (("patient_0", "un_0"), ("patient_2", "un_1")):
            (image,) = (raw / "imagesTr").glob(f"{source}_0000.*")
            shutil.copy(image, raw / "imagesUn" / image.name.replace(source, case))
        (label,) = (raw / "labelsTr").glob("patient_2.*")
        silver = raw / "labelsSilver" / label.name.replace("patient_2", "un_1")
        if dataset == VOLUMES:  # zeros inside of the image's box that the label takes into the mask
            image = sitk.ReadImage(str(raw / "imagesUn" / "un_1_0000.nii.gz"))
            array = sitk.GetArrayFromImage(image)
            array[9:14, 9:14, 4:9] = 0
            write_volume(raw / "imagesUn" / "un_1_0000.nii.gz", array, image.GetSpacing())
            array = np.zeros(array.shape, np.uint8)
            array[6:14, 7:20, 2:8] = 1
            write_volume(silver, array, image.GetSpacing())
        else:
            shutil.copy(label, silver)
        preprocess_pool(dataset, configuration, log=lambda line: None)
        return pool_folder(folder)

    yield make
    for raw, folder in made:
        for path in (*raw.glob("imagesUn"), *raw.glob("labelsSilver"), *folder.parent.glob("*_cfcl_pool"),
                     *folder.parent.glob("*_cfcl_pool.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def offer_pool(base: Path, dataset: str, folder: Path, names=("same",), cases=("un_0", "un_1")) -> Path:
    """All original images as counterfactuals of themselves, those of ``cases`` of the pool too."""
    for path in (base / "nnUNet_raw" / dataset / "imagesUn").iterdir():
        case, ending = path.name.split("_0000")
        for name in names if case in cases else ():
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / f"{case}__{name}_0000{ending}")
    return offer(base, dataset, folder, names)


@pytest.mark.parametrize(("dataset", "configuration"), CONFIGURATIONS)
def test_the_pools_images_as_counterfactuals_give_the_preprocessed_pool(
        datasets, make_pool, tmp_path, dataset, configuration):
    folder = make_pool(dataset, configuration)
    images = offer_pool(datasets, dataset, tmp_path / "images")
    store = import_counterfactuals(dataset, configuration, images, store_folder=tmp_path / "store")
    for case in ("un_0", "un_1"):
        data = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)[0]
        np.testing.assert_allclose(store.read(case, "same"), data[:], atol=1e-6, rtol=0)
        assert store._open_array(case, "same").blocks == data.blocks
    assert store.read("patient_2", "same").shape[0] == 1


def test_a_pools_case_has_all_interventions_or_none(datasets, make_pool, tmp_path):
    make_pool(XRAYS, "2d")
    attempt = lambda images: import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store")  # noqa: E731
    two = ("vendorA", "vendorB")
    images = offer_pool(datasets, XRAYS, tmp_path / "images", two, cases=("un_1",))
    (images / "un_1__vendorA_0000.png").unlink()
    with pytest.raises(UserError, match="lacks 1 counterfactuals: un_1__vendorA; fix: add them: every training case "
                                        "needs every intervention, and so does a case of the pool with any "
                                        "intervention"):
        attempt(images)
    (images / "un_1__vendorB_0000.png").unlink()
    assert {path.name[:4] for path in (attempt(images).folder / "cases").iterdir()} == {"pati", "odd_"}
    store = attempt(offer_pool(datasets, XRAYS, tmp_path / "images", two, cases=("un_1",)))
    store.check({"un_1": store.shape("un_1", "vendorA")}, CASES)
    # what was imported before counts
    store.path("un_1", "vendorB").unlink()
    for file in images.glob("un_1__*"):
        file.unlink()
    with pytest.raises(UserError, match="lacks 1 counterfactuals: un_1__vendorB"):
        attempt(images)


def test_counterfactuals_of_a_pool_that_is_out_of_date_or_not_preprocessed_name_the_command(
        datasets, make_pool, tmp_path):
    folder = make_pool(XRAYS, "2d")
    images = offer_pool(datasets, XRAYS, tmp_path / "images")
    raw = datasets / "nnUNet_raw" / XRAYS / "imagesUn"
    shutil.copy(raw / "un_0_0000.png", raw / "un_9_0000.png")
    attempt = lambda: import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store")  # noqa: E731
    with pytest.raises(UserError, match=r"1 new \(un_9\); fix: run nnunet_cfcl pool -d 802 -c 2d"):
        attempt()
    shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.json").unlink()
    with pytest.raises(UserError, match="2 cases that are not in .* or its pool: un_0, un_1; fix: preprocess cases of "
                                        "imagesUn with nnunet_cfcl pool -d 802 -c 2d"):
        attempt()
    assert not (tmp_path / "store").exists()


def test_masked_normalisation_needs_the_pools_raw_images(datasets, make_pool, tmp_path):
    make_pool(VOLUMES, "3d_fullres")
    images = offer_pool(datasets, VOLUMES, tmp_path / "images")
    shutil.rmtree(datasets / "nnUNet_raw" / VOLUMES / "imagesUn")
    with pytest.raises(UserError, match="images of case un_[01], which masked normalisation needs, are missing; fix: "
                                        "restore them in nnUNet_raw"):
        import_counterfactuals(VOLUMES, "3d_fullres", images, store_folder=tmp_path / "store")


def test_a_store_for_training_and_pool_passes_the_check_of_a_training_with_the_pool(datasets, make_pool, tmp_path):
    folder = make_pool(XRAYS, "2d")
    images = offer_pool(datasets, XRAYS, tmp_path / "images")
    store = import_counterfactuals(XRAYS, "2d", images, store_folder=tmp_path / "store")
    shapes = {case: tuple(nnUNetDatasetBlosc2(str(home), [case]).load_case(case)[0].shape)
              for home, cases in ((folder, ("un_0", "un_1")), (preprocessed_folder(datasets, XRAYS, "2d"), CASES))
              for case in cases}
    CounterfactualStore.open(store.folder).check(shapes)
