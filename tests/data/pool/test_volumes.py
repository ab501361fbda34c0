"""The pool of real volumes and X-rays equals nnU-Net's own preprocessing, voxel by voxel."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from nnunet_cfcl.data.pool.manifest import check_pool_is_current, pool_folder, read_manifest, silver_folder
from nnunet_cfcl.data.pool.run import preprocess_pool
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.errors import UserError
from tests.planning import plan_and_preprocess

pytestmark = pytest.mark.end_to_end

VOLUMES, XRAYS = "Dataset811_Hippocampus", "Dataset812_ChestXrays"
# the third is resampled in every axis, the others in one: the plan takes the median spacing
SPACINGS = {"hippocampus_004": (3.0, 1.0, 1.0), "hippocampus_011": (3.0, 1.0, 1.2), "hippocampus_026": (3.6, 1.1, 0.9)}
WHOLE = (slice(None),) * 3


def real_images() -> Path:
    folder = Path(os.environ.get("CFCL_TEST_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set CFCL_TEST_DATA (docs/architecture.md, Development)")
    return folder


def make_volumes(source: Path, raw: Path) -> dict:
    """Real MR volumes with thick slices along x and a border of zeros: transposed, cropped, masked, resampled."""
    for case, spacing in SPACINGS.items():
        for folder, name in (("imagesTr", f"{case}_0000.nii.gz"), ("labelsTr", f"{case}.nii.gz")):
            array = sitk.GetArrayFromImage(sitk.ReadImage(str(source / folder / name)))[:24, ::2, ::3]
            image = sitk.GetImageFromArray(np.pad(array, ((5, 3), (4, 6), (2, 1))))
            image.SetSpacing(spacing)
            image.SetOrigin((10.0, -20.0, 5.0))
            sitk.WriteImage(image, str(raw / folder / name))
    return json.loads((source / "dataset.json").read_text())


def make_xrays(source: Path, raw: Path) -> dict:
    with open(source / "meta.csv") as file:
        cases = [row["case_id"] for row in csv.DictReader(file)][:4]
    for case in cases[:3]:
        for part, name in (("images", f"imagesTr/{case}_0000.png"), ("masks", f"labelsTr/{case}.png")):
            io.imsave(raw / name, io.imread(source / part / f"{case}.png")[::2, ::2], check_contrast=False)
    return {"channel_names": {"0": "xray"}, "labels": {"background": 0, "right lung": 1, "left lung": 2},
            "file_ending": ".png"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Both datasets, planned and preprocessed by nnU-Net's own command."""
    base, source, planned = tmp_path_factory.mktemp("planned"), real_images(), {}
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    environment = {**os.environ, **{name: str(base / name) for name in names}}
    makers = [(VOLUMES, make_volumes, source / "Dataset004_Hippocampus", ["2d", "3d_fullres"]),
              (XRAYS, make_xrays, source / "cxr", ["2d"])]
    for dataset, make, folder, configurations in makers:
        raw = base / "nnUNet_raw" / dataset
        for part in ("imagesTr", "labelsTr"):
            (raw / part).mkdir(parents=True)
        description = make(folder, raw)
        (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": 3}))
        planned[dataset] = configurations
    plan_and_preprocess(planned, environment)
    return base


@pytest.fixture
def datasets(planned, tmp_path, monkeypatch):
    """A copy of both datasets for one test, set in the environment."""
    base = tmp_path / "nnunet"
    shutil.copytree(planned, base)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (base / name).mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(base / name))
    for dataset in (VOLUMES, XRAYS):
        for folder in ("imagesUn", "labelsSilver"):
            (base / "nnUNet_raw" / dataset / folder).mkdir()
    return base


def make_pool(dataset: str, configuration: str):
    return preprocess_pool(dataset, configuration, log=lambda line: None)


def preprocessed(base: Path, dataset: str, configuration: str) -> Path:
    return base / "nnUNet_preprocessed" / dataset / f"nnUNetPlans_{configuration}"


def plan_of(base: Path, dataset: str) -> tuple[PlansManager, dict]:
    folder = base / "nnUNet_preprocessed" / dataset
    return PlansManager(str(folder / "nnUNetPlans.json")), json.loads((folder / "dataset.json").read_text())


def copy_to_pool(raw: Path) -> list[str]:
    """Copy every training case into the pool under another name, with its manual label as silver label."""
    cases = []
    for path in sorted((raw / "imagesTr").iterdir()):
        case, ending = path.name.split("_0000.")
        shutil.copy(path, raw / "imagesUn" / f"copy_{path.name}")
        shutil.copy(raw / "labelsTr" / f"{case}.{ending}", raw / "labelsSilver" / f"copy_{case}.{ending}")
        cases.append(case)
    return cases


def test_the_volumes_exercise_transposing_cropping_masked_normalisation_and_resampling(planned):
    plans, _ = plan_of(planned, VOLUMES)
    configuration = plans.get_configuration("3d_fullres")
    assert plans.transpose_forward == [2, 0, 1]
    assert configuration.use_mask_for_norm == [True]
    folder = preprocessed(planned, VOLUMES, "3d_fullres")
    data, _, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case("hippocampus_026")
    before, cropped = properties["shape_before_cropping"], properties["shape_after_cropping_and_before_resampling"]
    assert all(whole > part != new for whole, part, new in zip(before, cropped, data.shape[1:]))


@pytest.mark.parametrize(("dataset", "configuration"), [(VOLUMES, "3d_fullres"), (VOLUMES, "2d"), (XRAYS, "2d")])
def test_a_copy_of_a_training_case_in_the_pool_is_voxel_identical_to_the_preprocessed_case(
        datasets, dataset, configuration):
    cases = copy_to_pool(datasets / "nnUNet_raw" / dataset)
    pool, silver = make_pool(dataset, configuration)
    folder = preprocessed(datasets, dataset, configuration)
    originals, copies = nnUNetDatasetBlosc2(str(folder)), nnUNetDatasetBlosc2(str(pool_folder(folder)))
    assert silver is None and sorted(copies.identifiers) == sorted(pool.cases) == [f"copy_{case}" for case in cases]
    for case in cases:
        (image, label, _, properties), (image_copy, channels, _, copied) = (
            originals.load_case(case), copies.load_case(f"copy_{case}"))
        np.testing.assert_array_equal(image_copy[:], image[:])
        np.testing.assert_array_equal(channels[:][:1], label[:])
        assert (channels[:][1] == 100).all()
        assert (image_copy.chunks, image_copy.blocks) == (image.chunks, image.blocks)
        assert copied.keys() == properties.keys()
        assert channels.dtype == label.dtype == np.int16
    check_pool_is_current(folder, plan_of(datasets, dataset)[0], configuration, plan_of(datasets, dataset)[1])


def test_silver_labels_of_training_cases_lie_on_the_grid_of_the_preprocessed_case(datasets):
    raw = datasets / "nnUNet_raw" / VOLUMES
    for path in sorted((raw / "labelsTr").iterdir())[1:]:
        shutil.copy(path, raw / "labelsSilver")
    (raw / "labelsSilver" / "silver.csv").write_text("case,quality\nhippocampus_026,0.9\n")
    pool, manifest = make_pool(VOLUMES, "3d_fullres")
    folder = preprocessed(datasets, VOLUMES, "3d_fullres")
    assert pool is None and not pool_folder(folder).exists()
    assert sorted(path.name for path in silver_folder(folder).iterdir()) == ["hippocampus_011.b2nd",
                                                                             "hippocampus_026.b2nd"]
    originals, silver = nnUNetDatasetBlosc2(str(folder)), SilverLabels(folder)
    assert silver.cases == ("hippocampus_011", "hippocampus_026") == tuple(manifest.cases)
    for case, percent in zip(silver.cases, (100, 90)):
        image, label, _, _ = originals.load_case(case)
        found, confidence = silver.read(case, WHOLE)
        np.testing.assert_array_equal(found, label[:][0])
        assert (confidence == percent).all() and manifest.cases[case].shape == image.shape
    plans, description = plan_of(datasets, VOLUMES)
    check_pool_is_current(folder, plans, "3d_fullres", description)
    assert sorted(nnUNetDatasetBlosc2(str(folder)).identifiers) == sorted(SPACINGS)


def test_a_training_image_that_changed_since_it_was_preprocessed_is_rejected(datasets):
    raw = datasets / "nnUNet_raw" / VOLUMES
    for case in ("hippocampus_004", "hippocampus_011"):
        for file, folder in ((raw / "imagesTr" / f"{case}_0000.nii.gz",) * 2, (raw / "labelsTr" / f"{case}.nii.gz",
                             raw / "labelsSilver" / f"{case}.nii.gz")):
            volume = sitk.ReadImage(str(file))
            sitk.WriteImage(volume[:, :, 1:], str(folder))
    with pytest.raises(UserError, match="^2 problems") as error:
        make_pool(VOLUMES, "3d_fullres")
    assert str(error.value).count("when it was preprocessed; fix: run nnUNetv2_preprocess -d 811") == 2


def test_another_border_of_a_training_image_is_rejected_though_its_size_is_the_same(datasets):
    raw, case = datasets / "nnUNet_raw" / VOLUMES, "hippocampus_004"
    file = raw / "imagesTr" / f"{case}_0000.nii.gz"
    volume = sitk.ReadImage(str(file))
    array = sitk.GetArrayFromImage(volume)
    changed = sitk.GetImageFromArray(np.roll(array, 2, axis=0))
    changed.CopyInformation(volume)
    sitk.WriteImage(changed, str(file))
    shutil.copy(raw / "labelsTr" / f"{case}.nii.gz", raw / "labelsSilver")
    with pytest.raises(UserError, match=f"raw image of training case {case} changed since it was preprocessed"):
        make_pool(VOLUMES, "3d_fullres")
    assert not read_manifest(silver_folder(preprocessed(datasets, VOLUMES, "3d_fullres"))).complete


def predict(base: Path, dataset: str, configuration: str, case: str) -> np.ndarray:
    """A prediction of a training case as nnU-Net exports it with --save_probabilities; its logits (H, Z, Y, X)."""
    plans, description = plan_of(base, dataset)
    data, label, _, properties = nnUNetDatasetBlosc2(
        str(preprocessed(base, dataset, configuration))).load_case(case)
    torch.manual_seed(0)
    # smooth in space, so that resampling keeps it, and different along every axis
    coarse = torch.randn(1, 3, *(min(n, 4) for n in data.shape[1:]))
    logits = 4 * torch.nn.functional.interpolate(coarse, data.shape[1:], mode="trilinear")[0]
    silver = base / "nnUNet_raw" / dataset / "labelsSilver"
    export_prediction_from_logits(logits, properties, plans.get_configuration(configuration), plans, description,
                                  str(silver / case), save_probabilities=True, num_threads_torch=1)
    return logits.numpy()


@pytest.mark.parametrize(("dataset", "configuration", "case", "resampled"), [
    (VOLUMES, "2d", "hippocampus_004", False), (VOLUMES, "3d_fullres", "hippocampus_026", True),
    (XRAYS, "2d", None, False)])
def test_nnunets_saved_probabilities_become_the_confidence_of_its_labels(
        datasets, dataset, configuration, case, resampled):
    folder = preprocessed(datasets, dataset, configuration)
    case = case or sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder)))[0]
    logits = predict(datasets, dataset, configuration, case)
    for name in ("dataset.json", "plans.json", "predict_from_raw_data_args.json"):
        (datasets / "nnUNet_raw" / dataset / "labelsSilver" / name).write_text("{}")
    _, manifest = make_pool(dataset, configuration)
    assert manifest.cases[case].probabilities and not manifest.cases[case].quality_given
    labels, confidence = SilverLabels(folder).read(case, WHOLE)
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    # where the label map was cut out of a border of zeros, nnU-Net writes -1
    inside = labels >= 0
    distance = np.abs(confidence - 100 * probabilities.max(0))[inside]
    agreement = (labels == probabilities.argmax(0))[inside].mean()
    assert inside.mean() > 0.9 and np.ptp(confidence[inside]) > 30
    # carried to the raw grid and back: only voxels between two classes may differ
    assert (agreement > 0.9 and np.mean(distance) < 4) if resampled else (agreement == 1 and distance.max() <= 0.51)


def test_labels_on_another_grid_are_all_listed(datasets):
    raw = datasets / "nnUNet_raw" / VOLUMES
    copy_to_pool(raw)
    changes = {"004": lambda image: image.SetSpacing((3.0, 1.0, 1.3)),
               "011": lambda image: image.SetOrigin((9.0, 0, 0)),
               "026": lambda image: image.SetDirection((-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))}
    for number, change in changes.items():
        file = raw / "labelsSilver" / f"copy_hippocampus_{number}.nii.gz"
        image = sitk.ReadImage(str(file))
        change(image)
        sitk.WriteImage(image, str(file))
    with pytest.raises(UserError, match="^3 problems") as error:
        make_pool(VOLUMES, "3d_fullres")
    for text in (r"004.nii.gz: has spacing 1.3, 1, 3, expected 1, 1, 3 as its image",
                 "011.nii.gz: has origin 9, 0, 0, expected 10, -20, 5 as its image",
                 "026.nii.gz: has direction -1, 0, 0, 0, -1, 0, 0, 0, 1, "
                 "expected 1, 0, 0, 0, 1, 0, 0, 0, 1 as its image"):
        assert text in str(error.value)


def test_a_header_that_was_rounded_by_another_tool_is_the_same_grid(datasets):
    raw = datasets / "nnUNet_raw" / VOLUMES
    copy_to_pool(raw)
    file = raw / "labelsSilver" / "copy_hippocampus_011.nii.gz"
    image = sitk.ReadImage(str(file))
    image.SetSpacing((3.0001, 0.99999, 1.2))
    image.SetOrigin((10.0005, -20.0, 5.0))
    sitk.WriteImage(image, str(file))
    pool, _ = make_pool(VOLUMES, "3d_fullres")
    assert pool.complete and len(pool.cases) == 3
