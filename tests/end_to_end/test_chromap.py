"""CHRO-maps from nnU-Net's command and from ours, on real volumes; on X-rays: `test_train_2d`."""

import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

pytestmark = pytest.mark.end_to_end

TRAINER, PLANS = "nnUNetTrainerDVDCL", "shortPlans"
PREDICT = ("-f", "0", "-p", PLANS, "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1")


@pytest.fixture(scope="module")
def volumes(hippocampus, tmp_path_factory):
    """A briefly trained 3d_fullres model, and three volumes to predict."""
    nnunet = hippocampus.copy(tmp_path_factory.mktemp("chromap_3d"))
    nnunet.settings()
    nnunet.load_in_main_process()
    # the last line before nnU-Net's own validation
    nnunet.run_until("Colour space of CHRO-maps:",
                     "nnUNetv2_train", "4", "3d_fullres", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    assert (nnunet.fold("Dataset004_Hippocampus", "3d_fullres") / "cfcl/chromap_space.npz").is_file()
    images = nnunet.root / "images"
    images.mkdir()
    for file in sorted((nnunet.folder("raw") / "Dataset004_Hippocampus/imagesTr").iterdir())[:3]:
        shutil.copy(file, images / file.name)
    return nnunet


def predict(nnunet, out, *command, **variables):
    kept, nnunet.variables = nnunet.variables, {**nnunet.variables, **variables}
    try:
        output = nnunet.run(*command, "-i", str(nnunet.root / "images"), "-o", str(nnunet.root / out))
    finally:
        nnunet.variables = kept
    return output, nnunet.root / out


STOCK = ("nnUNetv2_predict", "-d", "4", "-c", "3d_fullres", *PREDICT)


@pytest.fixture(scope="module")
def mapped(volumes):
    """The folder that nnU-Net's command writes where the variable is set, and what it prints."""
    output, folder = predict(volumes, "mapped", *STOCK, nnUNet_cfcl_chromap="1")
    return folder, output


def check_volume(folder, image, case):
    """The map has the image's voxels and geometry, and colours; the montage is a picture."""
    source, found = sitk.ReadImage(str(image)), sitk.ReadImage(str(folder / f"{case}.nii.gz"))
    for name in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(source, name)(), atol=1e-4)
    assert len(np.unique(sitk.GetArrayFromImage(found).reshape(-1, 3), axis=0)) > 20
    assert nibabel.load(folder / f"{case}.nii.gz").get_data_dtype().names == ("R", "G", "B")
    montage = np.asarray(Image.open(folder / f"{case}.png"))
    assert min(montage.shape[:2]) > 200 and montage.std() > 5


def test_the_stock_command_writes_maps_where_the_variable_is_set_and_the_same_masks_as_ours_without_the_flag(
        volumes, mapped):
    mapped, output = mapped
    _, plain = predict(volumes, "plain", "nnunet_cfcl", "predict", "-d", "4", "-c", "3d_fullres", *PREDICT)
    assert "CHRO-maps of 3 cases" in output and "no colour space of its own" not in output
    assert not (plain / "chromap").exists() and len(list(plain.glob("*.nii.gz"))) == 3
    assert {file.name for file in mapped.iterdir()} == {file.name for file in plain.iterdir()} | {"chromap"}
    for mask in plain.glob("*.nii.gz"):
        np.testing.assert_array_equal(nibabel.load(mask).get_fdata(), nibabel.load(mapped / mask.name).get_fdata())
        case = mask.name.removesuffix(".nii.gz")
        check_volume(mapped / "chromap", volumes.root / "images" / f"{case}_0000.nii.gz", case)
    labels = volumes.folder("raw") / "Dataset004_Hippocampus/labelsTr"
    truth = volumes.root / "truth"
    truth.mkdir()
    for mask in plain.glob("*.nii.gz"):
        shutil.copy(labels / mask.name, truth / mask.name)
    volumes.run("nnUNetv2_evaluate_folder", str(truth), str(mapped), "-djfile", str(mapped / "dataset.json"),
                "-pfile", str(mapped / "plans.json"))


def test_any_nnunet_model_is_mapped_in_colours_fitted_on_the_images_at_hand(volumes):
    stock = volumes.root / "stock_model"
    volumes.run("nnunet_cfcl", "export-stock", str(volumes.fold("Dataset004_Hippocampus", "3d_fullres")), str(stock))
    output, mapped = predict(volumes, "stock", "nnunet_cfcl", "predict", "-m", str(stock), "-f", "0", "-device", "cpu",
                             "-npp", "1", "-nps", "1", "--chromap", "--embedding", "--palette", "oklch")
    assert "no colour space of its own" in output and (mapped / "chromap/chromap_space.npz").is_file()
    assert len(list(mapped.glob("*.nii.gz"))) == 3
    for image in (volumes.root / "images").iterdir():
        case = image.name.removesuffix("_0000.nii.gz")
        check_volume(mapped / "chromap", image, case)
        embedding = sitk.ReadImage(str(mapped / "chromap" / f"{case}_embedding.nii.gz"))
        assert embedding.GetNumberOfComponentsPerPixel() == 2
        assert np.linalg.norm(sitk.GetArrayFromImage(embedding), axis=-1).max() <= 1.001


def test_after_a_kill_the_missing_maps_are_made_in_the_same_colours(volumes, mapped):
    whole, _ = mapped
    volumes.variables["nnUNet_cfcl_chromap"] = "1"
    where = ("-i", str(volumes.root / "images"), "-o", str(volumes.root / "killed"))
    try:
        volumes.run_until("Waiting for remaining segmentation exports", *STOCK, *where)
        volumes.run(*STOCK, *where, "--continue_prediction")
    finally:
        del volumes.variables["nnUNet_cfcl_chromap"]
    for file in sorted((whole / "chromap").glob("*.nii.gz")):
        again = nibabel.load(volumes.root / "killed/chromap" / file.name)
        np.testing.assert_array_equal(np.asarray(nibabel.load(file).dataobj), np.asarray(again.dataobj))
        assert (volumes.root / "killed/chromap" / file.name.replace(".nii.gz", ".png")).is_file()


@pytest.mark.parametrize(("change", "words"), [
    ({"-m": "nowhere"}, ["no model folder", "nnUNet_results"]),
    ({"-f": "3"}, ["no trained fold 3", "found: 0"]),
    ({"-i": "nowhere"}, ["no images named CASE_0000.nii.gz"]),
    ({"--space": "nowhere.npz"}, ["no colour space"]),
    ({"-device": "cuda"}, ["-device cpu"]),
])
def test_bad_input_is_one_clear_line(volumes, run_here, change, words):
    arguments = {"-i": str(volumes.root / "images"), "-o": str(volumes.root / "bad"), "-device": "cpu",
                 "-m": str(volumes.fold("Dataset004_Hippocampus", "3d_fullres").parent), **change}
    output = run_here(volumes, "nnunet_cfcl", "chromap", *(one for pair in arguments.items() for one in pair), status=1)
    assert output.count("nnunet_cfcl chromap: ") == 1 and all(word in output for word in words), output


def test_a_folder_that_is_a_file_is_refused_before_anything_is_computed(volumes, run_here):
    (volumes.root / "file").mkdir()
    (volumes.root / "file/chromap").touch()
    model = volumes.fold("Dataset004_Hippocampus", "3d_fullres").parent
    output = run_here(volumes, "nnunet_cfcl", "chromap", "-i", str(volumes.root / "images"), "-o",
                      str(volumes.root / "file"), "-m", str(model), "-device", "cpu", status=1)
    assert "cannot write" in output and "another output folder" in output
