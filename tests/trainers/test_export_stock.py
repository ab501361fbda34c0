"""Exported folds predict as the original, with stock nnU-Net and without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_cfcl.cli import main
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.trainers.export_stock import BEST, FINAL, export_stock, stock_checkpoint

PREDICT = """
import sys
import numpy as np, torch
if sys.argv[3] == "without":
    sys.modules["nnunet_cfcl"] = None  # any import of it now fails
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
torch.set_num_threads(1)
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(sys.argv[1], None, "checkpoint_final.pth")
image = np.random.default_rng(3).normal(size=(1, 1, 24, 24)).astype(np.float32)
labels, probabilities = predictor.predict_single_npy_array(image, {"spacing": [999.0, 1.0, 1.0]}, None, None, True)
np.savez(sys.argv[2], labels=labels, probabilities=probabilities,
         mirroring=predictor.allowed_mirroring_axes or ())
"""


def predict(model: Path, out: Path, plugin: str) -> dict[str, np.ndarray]:
    """Predict an image with nnU-Net's own predictor in a process ``with`` or ``without`` the package."""
    done = subprocess.run([sys.executable, "-c", PREDICT, str(model), str(out), plugin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def trained_fold(fold: int | str = 0, configuration: str = "2d", names: tuple[str, ...] = (FINAL, BEST),
                 trainer_name: str = "nnUNetTrainerDVDCL") -> Path:
    """Write the folder of a trained fold (with initial weights)."""
    import nnunet_cfcl.trainers
    from nnunet_cfcl.nnunet.lookup import look_up_trainer

    folder = Path(os.environ["nnUNet_preprocessed"]) / "Dataset007_Toy"
    plans, description = (json.loads((folder / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    trainer_class = getattr(nnunet_cfcl.trainers, trainer_name, None) or look_up_trainer(trainer_name)
    plans["continue_training"] = False
    trainer = trainer_class(plans, configuration, fold, description, torch.device("cpu"))
    trainer.initialize()
    for weight in trainer.network.parameters():  # nnU-Net initialises biases with zero, which would hide a lost bias
        weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    network = trainer.network
    sum(map(torch.sum, network(torch.ones(2, 1, 16, 16)))).backward()
    trainer.optimizer.step()  # gives the optimiser a momentum to save, as after a training
    for name in names:
        trainer.save_checkpoint(str(Path(trainer.output_folder) / name))
    for name, content in (("plans.json", plans), ("dataset.json", description), ("dataset_fingerprint.json", {})):
        (Path(trainer.output_folder_base) / name).write_text(json.dumps(content))
    return Path(trainer.output_folder)


@pytest.fixture
def fold_folder(toy) -> Path:
    return trained_fold()


def test_the_export_predicts_identically_without_the_package(fold_folder, toy, monkeypatch):
    from nnunet_cfcl.nnunet.installation import trainers_path

    export_stock(fold_folder, toy / "export")
    without = predict(toy / "export", toy / "without.npz", "without")
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_path()))
    original = predict(fold_folder.parent, toy / "with.npz", "with")
    for name in original:
        np.testing.assert_array_equal(without[name], original[name])
    assert 0 < original["labels"].mean() < 1  # both classes occur, so that equality is meaningful


def test_the_export_contains_only_what_prediction_needs(fold_folder, toy):
    written = export_stock(fold_folder, toy / "export")
    assert written == [toy / "export" / "fold_0" / FINAL, toy / "export" / "fold_0" / BEST]
    exported = torch.load(written[0], weights_only=False)
    original = torch.load(fold_folder / FINAL, weights_only=False)
    assert set(exported) == {"network_weights", "init_args", "trainer_name", "inference_allowed_mirroring_axes"}
    assert exported["trainer_name"] == "nnUNetTrainer"
    assert exported["init_args"]["configuration"] == "2d"
    for name, weight in original["network_weights"].items():
        assert torch.equal(exported["network_weights"][name], weight)
    assert all(weight.device.type == "cpu" for weight in exported["network_weights"].values())
    assert written[0].stat().st_size < 0.75 * (fold_folder / FINAL).stat().st_size
    assert {file.name for file in (toy / "export").iterdir()} == {
        "fold_0", "dataset.json", "plans.json", "dataset_fingerprint.json"}


def test_a_view_of_a_larger_storage_is_saved_with_its_own_values_only(toy):
    checkpoint = {"network_weights": {"w": torch.zeros(10**6)[:2]}, "init_args": {}, "trainer_name": "x"}
    torch.save(stock_checkpoint(checkpoint), toy / "small.pth")
    assert (toy / "small.pth").stat().st_size < 10_000


def test_further_folds_join_the_export_and_repeating_changes_nothing(fold_folder, toy):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    export_stock(fold_folder, toy / "export")
    export_stock(trained_fold(fold=1, names=(FINAL,)), toy / "export")
    before = (toy / "export" / "fold_0" / FINAL).read_bytes()
    export_stock(fold_folder, toy / "export")
    assert (toy / "export" / "fold_0" / FINAL).read_bytes() == before
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(toy / "export"), None)
    assert len(predictor.list_of_parameters) == 2
    assert not list((toy / "export").rglob("*.tmp"))


def test_the_command_reports_its_files_and_how_to_predict(fold_folder, toy, capsys):
    assert main(["export-stock", str(fold_folder), str(toy / "export")]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {toy / 'export' / 'fold_0' / FINAL}" in shown
    assert f"nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {toy / 'export'} -f 0" in shown


def test_a_stock_training_accepts_the_export_as_pretrained_weights(fold_folder, toy):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    file = export_stock(fold_folder, toy / "export")[0]
    weights = torch.load(file, weights_only=False)
    trainer = nnUNetTrainer({**weights["init_args"]["plans"], "continue_training": False}, "2d", 0,
                            weights["init_args"]["dataset_json"], torch.device("cpu"))
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))
    loaded = trainer.network.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights["network_weights"].items()
               if ".seg_layers." not in name)


# ---------------------------------------------------------------------------------------------- clear errors

def test_an_unfinished_training_is_an_error_with_the_command_that_continues_it(toy):
    unfinished = trained_fold(names=("checkpoint_latest.pth",))
    with pytest.raises(UserError, match=r"not finished; fix: continue it with nnUNetv2_train \.\.\. --c"):
        export_stock(unfinished, toy / "export")
    assert not (toy / "export").exists()


@pytest.mark.parametrize("wrong", ["", "fold_9", "fold_0/validation"])
def test_another_folder_than_that_of_a_trained_fold_is_an_error(fold_folder, toy, wrong):
    (fold_folder / "validation").mkdir()
    with pytest.raises(UserError, match="is not the folder of a trained fold.*; fix: name nnUNet_results/DATASET/"):
        export_stock(fold_folder.parent / wrong, toy / "export")


@pytest.mark.parametrize("part", [".", ".."])
def test_the_model_cannot_be_exported_onto_itself(fold_folder, part):
    before = (fold_folder / FINAL).read_bytes()
    with pytest.raises(UserError, match="is the model itself, expected a separate folder; fix: name another OUT"):
        export_stock(fold_folder, fold_folder / part)
    assert (fold_folder / FINAL).read_bytes() == before


def test_the_results_of_a_stock_training_are_not_overwritten(fold_folder, toy):
    stock = trained_fold(trainer_name="nnUNetTrainer")
    before = (stock / FINAL).read_bytes()
    with pytest.raises(UserError, match="comes from a training, not from an export; fix: name another OUT"):
        export_stock(fold_folder, stock.parent)
    assert (stock / FINAL).read_bytes() == before


def test_exports_of_different_plans_are_not_mixed(fold_folder, toy):
    export_stock(fold_folder, toy / "export")
    (toy / "export" / "plans.json").write_text("{}")
    with pytest.raises(UserError, match="already contains another model"):
        export_stock(fold_folder, toy / "export")


def test_exports_of_different_configurations_are_not_mixed(fold_folder, toy):
    export_stock(fold_folder, toy / "export")
    with pytest.raises(UserError, match="configuration 2d, this one is 2d_small"):
        export_stock(trained_fold(fold=1, configuration="2d_small"), toy / "export")


def test_a_trainer_with_its_own_network_cannot_be_exported(toy):
    own_network = trained_fold(trainer_name="nnUNetTrainerBN")
    with pytest.raises(UserError, match="nnUNetTrainerBN builds its own network"):
        export_stock(own_network, toy / "export")


def test_weights_that_do_not_fit_the_plan_cannot_be_exported(fold_folder, toy):
    plans = json.loads((fold_folder.parent / "plans.json").read_text())
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16]
    (fold_folder.parent / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match="does not fit the network"):
        export_stock(fold_folder, toy / "export")
    assert not (toy / "export").exists()


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_damaged_or_foreign_checkpoint_is_an_error(fold_folder, toy, content):
    if content is None:
        torch.save({"state_dict": {}}, fold_folder / FINAL)
    else:
        (fold_folder / FINAL).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read|not a checkpoint of an nnU-Net training"):
        export_stock(fold_folder, toy / "export")


def test_a_file_at_the_path_of_the_export_is_an_error(fold_folder, toy):
    (toy / "export").touch()
    with pytest.raises(UserError, match="cannot write .*; fix: name another OUT"):
        export_stock(fold_folder, toy / "export")
