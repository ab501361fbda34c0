"""Counterfactuals made elsewhere, on real volumes: imported by our command, used by nnU-Net's."""

import json
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_cfcl.counterfactual import CounterfactualStore
from nnunet_cfcl.errors import UserError

pytestmark = pytest.mark.end_to_end

DATASET, PLANS = "Dataset004_Hippocampus", "shortPlans"
GAMMA = {"bright": 0.7, "dark": 1.5}
TRAIN = ["nnUNetv2_train", "4", "3d_fullres", "0", "-tr", "nnUNetTrainerDVDCL", "-p", PLANS, "-device", "cpu"]


def _write_counterfactuals(raw: Path, folder: Path) -> None:
    """Every training image with two other transfer curves, on its own voxel grid."""
    for file in sorted((raw / "imagesTr").glob("*_0000.nii.gz")):
        image = SimpleITK.ReadImage(str(file))
        array = SimpleITK.GetArrayFromImage(image).astype(np.float32)
        for name, gamma in GAMMA.items():
            altered = SimpleITK.GetImageFromArray(array.max() * (array / array.max()) ** gamma)
            altered.CopyInformation(image)
            SimpleITK.WriteImage(altered, str(folder / file.name.replace("_0000.", f"__{name}_0000.")))


@pytest.fixture(scope="module")
def results(hippocampus, tmp_path_factory) -> Path:
    """A results folder and settings of this module alone."""
    folder = tmp_path_factory.mktemp("precomputed_results")
    before = dict(hippocampus.variables)
    hippocampus.variables["nnUNet_results"] = str(folder)
    hippocampus.settings(counterfactual={"source": "precomputed", "count": 2})
    hippocampus.load_in_main_process()
    yield folder
    hippocampus.variables.clear()
    hippocampus.variables.update(before)


@pytest.fixture(scope="module")
def fold(results) -> Path:
    return results / DATASET / f"nnUNetTrainerDVDCL__{PLANS}__3d_fullres" / "fold_0"


@pytest.fixture(scope="module")
def store(hippocampus, results, tmp_path_factory) -> CounterfactualStore:
    """A store made by the command; it lies where other tests do not look, else they would find and use it."""
    images, target = (tmp_path_factory.mktemp(name) for name in ("counterfactuals", "store"))
    _write_counterfactuals(hippocampus.folder("raw") / DATASET, images)
    output = hippocampus.run(
        "nnunet_cfcl", "counterfactuals", "import", "-d", "4", "-c", "3d_fullres", "-p", PLANS, "-i", str(images),
        "-o", str(target), "-np", "1",
    )
    assert f"{target}: interventions bright, dark" in output
    hippocampus.settings(counterfactual={"source": "precomputed", "count": 2, "store": str(target)})
    return CounterfactualStore.open(target)


@pytest.fixture(scope="module")
def pretrained(hippocampus, store) -> str:
    """What nnU-Net's command printed until phase 2 began."""
    return hippocampus.run_until("Phase 2", *TRAIN)


def test_without_a_store_the_command_stops_and_names_the_import(hippocampus, results):
    hippocampus.settings(counterfactual={"source": "precomputed", "count": 2})
    output = hippocampus.run(*TRAIN, status=1)
    assert "holds no store" in output and "nnunet_cfcl counterfactuals import" in output
    assert "Phase 1" not in output


def test_every_case_is_imported_in_the_shape_of_its_preprocessed_image(hippocampus, store):
    folder = hippocampus.folder("preprocessed") / DATASET / store.data_identifier
    cases = sorted(f.name.removesuffix(".b2nd") for f in folder.glob("*.b2nd") if not f.name.endswith("_seg.b2nd"))
    assert len(cases) == 10 and store.interventions == ("bright", "dark")
    for case in cases:
        original = blosc2.open(str(folder / f"{case}.b2nd"), mode="r")[:]
        images = [store.read(case, name) for name in store.interventions]
        assert all(image.shape == original.shape for image in images)
        # a gamma curve keeps the order of the intensities, so voxels correspond where ranks do
        ranks = [np.argsort(np.argsort(array.ravel())) for array in (original, *images)]
        assert min(np.corrcoef(ranks)[0]) > 0.98
        assert images[0].mean() == pytest.approx(0, abs=0.05) and np.abs(images[0] - images[1]).mean() > 0.05


def test_the_pretraining_uses_the_store_and_comes_to_its_end(pretrained, fold):
    assert "counterfactuals: precomputed" in pretrained and "counterfactuals: acquisition" not in pretrained
    assert "Phase 1 done" in pretrained
    lines = [json.loads(line) for line in (fold / "cfcl/pretraining/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and all(np.isfinite(line["loss"]) for line in lines)
    config = json.loads((fold / "cfcl/config.json").read_text())
    assert config["pretraining"]["counterfactuals"]["source"] == "precomputed"
    assert config["pretraining"]["counterfactuals"]["interventions"] == ["bright", "dark"]
    weights = torch.load(fold / "cfcl/pretraining/checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_counterfactual_of_the_wrong_shape_stops_the_trainer_before_any_training(
    hippocampus, fold, pretrained, store, trainers_of, capsys
):
    case = json.loads((fold / "cfcl/config.json").read_text())["pretraining"]["cases"][3]
    kept = store.read(case, "dark")
    store.write(case, "dark", kept[:, :, 1:])
    trainer = trainers_of(hippocampus, DATASET, "3d_fullres")(
        counterfactual={"source": "precomputed", "count": 2, "store": str(store.folder)})
    with pytest.raises(UserError) as error:
        trainer.run_training()
    wrong = (kept.shape[0], kept.shape[1], kept.shape[2] - 1, kept.shape[3])
    assert f"{case}__dark.b2nd has shape {wrong}, expected {kept.shape}" in str(error.value)
    output = capsys.readouterr().out
    assert "Phase 1" not in output and "Pretraining epoch" not in output and "Epoch 0" not in output
