"""CHRO-maps from nnU-Net's command and from ours, on real volumes and real X-rays."""

import json
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
    output = nnunet.run("nnUNetv2_train", "4", "3d_fullres", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    assert "Colour space of CHRO-maps:" in output
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


def check_volume(folder, image, case):
    """The map has the image's voxels and geometry, and colours; the montage is a picture."""
    source, found = sitk.ReadImage(str(image)), sitk.ReadImage(str(folder / f"{case}.nii.gz"))
    for name in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(source, name)(), atol=1e-4)
    assert len(np.unique(sitk.GetArrayFromImage(found).reshape(-1, 3), axis=0)) > 20
    assert nibabel.load(folder / f"{case}.nii.gz").get_data_dtype().names == ("R", "G", "B")
    montage = np.asarray(Image.open(folder / f"{case}.png"))
    assert min(montage.shape[:2]) > 200 and montage.std() > 5


def test_the_stock_command_writes_maps_where_the_variable_is_set_and_the_same_masks(volumes):
    command = ("nnUNetv2_predict", "-d", "4", "-c", "3d_fullres", *PREDICT)
    _, plain = predict(volumes, "plain", *command)
    output, mapped = predict(volumes, "mapped", *command, nnUNet_cfcl_chromap="1")
    assert "CHRO-maps of 3 cases" in output and "no colour space of its own" not in output
    assert not (plain / "chromap").exists()
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


def test_without_the_flag_predict_is_nnunets_own(volumes):
    _, plain = predict(volumes, "ours_plain", "nnunet_cfcl", "predict", "-d", "4", "-c", "3d_fullres", *PREDICT)
    assert not (plain / "chromap").exists() and len(list(plain.glob("*.nii.gz"))) == 3


def test_after_a_kill_the_missing_maps_are_made_in_the_same_colours(volumes):
    command = ("nnUNetv2_predict", "-d", "4", "-c", "3d_fullres", *PREDICT)
    _, whole = predict(volumes, "whole", *command, nnUNet_cfcl_chromap="1")
    volumes.variables["nnUNet_cfcl_chromap"] = "1"
    where = ("-i", str(volumes.root / "images"), "-o", str(volumes.root / "killed"))
    try:
        volumes.run_until("Waiting for remaining segmentation exports", *command, *where)
        volumes.run(*command, *where, "--continue_prediction")
    finally:
        del volumes.variables["nnUNet_cfcl_chromap"]
    for file in sorted((whole / "chromap").glob("*.nii.gz")):
        again = nibabel.load(volumes.root / "killed/chromap" / file.name)
        np.testing.assert_array_equal(np.asarray(nibabel.load(file).dataobj), np.asarray(again.dataobj))
        assert (volumes.root / "killed/chromap" / file.name.replace(".nii.gz", ".png")).is_file()


def test_x_rays_are_mapped_in_their_own_pixels_without_masks(chest_xrays, tmp_path):
    # results of their own: another test's training would find this one's phase 1 done
    chest_xrays = chest_xrays.copy(tmp_path)
    chest_xrays.settings()
    chest_xrays.run("nnUNetv2_train", "10", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    model = chest_xrays.fold("Dataset010_ChestXrays", "2d").parent
    images, out = chest_xrays.folder("raw") / "Dataset010_ChestXrays/imagesTs", chest_xrays.root / "maps"
    output = chest_xrays.run(
        "nnunet_cfcl", "chromap", "-i", str(images), "-o", str(out), "-m", str(model), "-device", "cpu")
    assert "CHRO-maps of 4 cases" in output
    assert [file.name for file in out.iterdir()] == ["chromap"]
    for file in images.iterdir():
        drawn = np.asarray(Image.open(out / "chromap" / file.name.replace("_0000", "")))
        grey = np.asarray(Image.open(file)).astype(float)
        assert drawn.shape == (*grey.shape, 3)
        assert np.corrcoef(drawn.mean(-1).ravel(), grey.ravel())[0, 1] > 0.5  # the image shows through
    summary = json.loads((out / "chromap/summary.json").read_text())
    assert len(summary["cases"]) == 4 and summary["color_space"]["reducer"] == "pca"


@pytest.mark.parametrize(("change", "words"), [
    ({"-m": "nowhere"}, ["no model folder", "nnUNet_results"]),
    ({"-f": "3"}, ["no trained fold 3", "found: 0"]),
    ({"-i": "nowhere"}, ["no images named CASE_0000.nii.gz"]),
    ({"--space": "nowhere.npz"}, ["no colour space"]),
    ({"-device": "cuda"}, ["-device cpu"]),
])
def test_bad_input_is_one_clear_line(volumes, change, words):
    arguments = {"-i": str(volumes.root / "images"), "-o": str(volumes.root / "bad"), "-device": "cpu",
                 "-m": str(volumes.fold("Dataset004_Hippocampus", "3d_fullres").parent), **change}
    output = volumes.run("nnunet_cfcl", "chromap", *(one for pair in arguments.items() for one in pair), status=1)
    assert "Traceback" not in output and all(word in output for word in words), output


def test_a_folder_that_is_a_file_is_refused_before_anything_is_computed(volumes):
    (volumes.root / "file").mkdir()
    (volumes.root / "file/chromap").touch()
    model = volumes.fold("Dataset004_Hippocampus", "3d_fullres").parent
    output = volumes.run("nnunet_cfcl", "chromap", "-i", str(volumes.root / "images"), "-o", str(volumes.root / "file"),
                         "-m", str(model), "-device", "cpu", status=1)
    assert "cannot write" in output and "another output folder" in output
