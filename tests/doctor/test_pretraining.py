"""Every fault that stops a pretraining is reported by the doctor, in the training's words and with a fix."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from skimage import io

from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest, write_manifest
from nnunet_cfcl.data.pool.run import preprocess_pool
from nnunet_cfcl.data.pool.silver_model import SilverModel
from nnunet_cfcl.doctor.run import Training, examine
from nnunet_cfcl.errors import CheckResult, UserError
from nnunet_cfcl.nnunet.installation import trainers_path
from nnunet_cfcl.nnunet.plan import check_single_stage
from nnunet_cfcl.trainers.lookup import plugin_trainers

SHAPE = (1, 1, 24, 24)
CASES = [f"toy_{i}" for i in range(6)]


@pytest.fixture(autouse=True)
def our_trainers(toy, monkeypatch):
    """nnU-Net finds the package's trainers and those in the folder that is returned."""
    folder = toy / "external"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_extTrainer", f"{trainers_path()}{os.pathsep}{folder}")
    return folder


@pytest.fixture
def configure(toy, monkeypatch):
    """A function that writes the settings file."""

    def write(**settings):
        (toy / "mine.json").write_text(json.dumps({key.replace("__", "."): value for key, value in settings.items()}))
        monkeypatch.setenv("nnUNet_cfcl_config", str(toy / "mine.json"))

    return write


@pytest.fixture
def store(toy_cases) -> CounterfactualStore:
    """A complete store of one intervention for all toy cases."""
    made = CounterfactualStore.create(default_store_root(toy_cases) / "mine", ["vendorB"], "a test")
    for case in CASES:
        made.write(case, "vendorB", np.ones(SHAPE, np.float32))
    return made


def findings(status, trainer="nnUNetTrainerDVDCL", configuration="2d") -> list[CheckResult]:
    asked = Training("7", configuration, trainer=trainer, device="cpu")
    return [found for found in examine(asked) if found.status == status and "memory" not in found.message]


def only(status, **named) -> CheckResult:
    found = findings(status, **named)
    assert len(found) == 1, [finding.line() for finding in found]
    return found[0]


def change_2d(change_plan, **keys):
    change_plan(lambda plan: plan["configurations"]["2d"].update(keys))


def test_a_valid_configuration_can_be_pretrained(toy):
    assert findings("FAIL") + findings("warn") == []
    found = [finding.message for finding in findings("ok")]
    assert "PlainConvUNet has a decoder that can be pretrained" in found
    assert "32 patches per step of pretraining, at most 4 per pass" in found
    assert "counterfactuals available for all cases" in found


def test_a_patch_too_small_for_the_views_fails_until_the_named_setting_is_changed(toy, change_plan, configure):
    change_2d(change_plan, patch_size=[8, 8])
    failure = only("FAIL")
    assert failure.message.startswith("the patch [8, 8] is too small for the views")
    assert failure.fix.startswith("set views.crop_fraction in a JSON file named by nnUNet_cfcl_config")
    configure(views__crop_fraction=[0.25, 1.0])
    assert findings("FAIL") == []


@pytest.mark.parametrize("switch", ["trainer", "setting"])
def test_a_training_without_pretraining_is_not_checked_for_it(toy, change_plan, configure, switch):
    change_2d(change_plan, patch_size=[8, 8])
    if switch == "setting":
        configure(pretrain__enabled=False)
    assert findings("FAIL", "nnUNetTrainer" if switch == "trainer" else "nnUNetTrainerDVDCL") == []


def test_a_trainer_nnunet_does_not_find_yet_is_checked_all_the_same(toy, change_plan, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    change_2d(change_plan, patch_size=[8, 8])
    unknown, patch = findings("FAIL")
    assert unknown.fix.startswith("export nnUNet_extTrainer=") and "too small" in patch.message


def test_a_wrong_setting_is_reported_once(toy, configure):
    configure(pretrain__epoch=3)
    assert "pretrain.epochs" in only("FAIL").fix


def test_a_cascades_second_stage_is_refused_and_the_first_named(toy, change_plan):
    change_plan(lambda plan: plan["configurations"].update(
        second={"inherits_from": "2d", "previous_stage": "2d"}))
    failure = only("FAIL", configuration="second")
    assert failure.message.startswith("'second' takes the previous stage's segmentation as input")
    # another trainer would look for the first stage's masks in another folder
    assert failure.fix.startswith("-c 2d, or set pretrain.enabled to false for this stage in ")


def test_an_unsupported_feature_is_a_user_error_and_a_not_implemented_error():
    stage = SimpleNamespace(previous_stage_name="3d_lowres")
    with pytest.raises(NotImplementedError, match="fix: pretrain 3d_lowres first, then train this stage with") as error:
        check_single_stage("3d_cascade_fullres", stage)
    assert isinstance(error.value, UserError)


def external(folder, name, base, body="pass"):
    module, _, base_name = base.rpartition(".")
    (folder / f"{name}.py").write_text(
        f"import torch\nfrom {module} import {base_name}\nfrom nnunet_cfcl.trainers import CounterfactualPretraining\n"
        f"class {name}(CounterfactualPretraining, {base_name}):\n    {body}\n")


NNUNET = "nnunetv2.training.nnUNetTrainer."


def test_a_plan_with_another_architecture_than_a_unet_fails(toy, change_plan, monkeypatch):
    from dynamic_network_architectures.architectures import unet
    from torch import nn

    class Strange(unet.PlainConvUNet):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.decoder = nn.Identity()

    monkeypatch.setattr(unet, "Strange", Strange, raising=False)
    change_plan(lambda plan: plan["configurations"]["2d"]["architecture"].update(
        network_class_name="dynamic_network_architectures.architectures.unet.Strange"))
    failure = next(found for found in findings("FAIL") if "decoder" in found.message)
    assert failure.message.startswith("Strange has no decoder of nnU-Net's U-Net kind")
    assert failure.fix == "nnUNetv2_plan_and_preprocess -d 7 -c 2d, then -p nnUNetPlans"


def test_a_trainer_that_builds_a_network_without_a_unet_decoder_fails(toy, our_trainers):
    external(our_trainers, "Transformer", f"{NNUNET}nnUNetTrainer.nnUNetTrainer",
             "build_network_architecture = staticmethod(lambda *arguments: torch.nn.Linear(3, 4))")
    failure = only("FAIL", trainer="Transformer")
    assert failure.message.startswith("Linear has no decoder of nnU-Net's U-Net kind")
    assert failure.fix == "derive the trainer from one that builds the plan's own network"


def test_a_network_that_cannot_be_built_on_the_meta_device_is_a_warning(toy, our_trainers):
    external(our_trainers, "NeedsValues", f"{NNUNET}nnUNetTrainer.nnUNetTrainer",
             "build_network_architecture = staticmethod(lambda *arguments: torch.zeros(1).item())")
    assert findings("FAIL", trainer="NeedsValues") == []
    assert only("warn", trainer="NeedsValues").message.startswith("decoder and norms not checked")


def test_batch_norm_with_cached_gradients_fails_and_passes_in_one_pass(toy, our_trainers, configure):
    external(our_trainers, "WithBatchNorm", f"{NNUNET}variants.network_architecture.nnUNetTrainerBN.nnUNetTrainerBN")
    failure = only("FAIL", trainer="WithBatchNorm")
    assert failure.message.startswith("BatchNorm2d at 'encoder.") and "patches_per_pass to 32" in failure.fix
    configure(pretrain__patches_per_pass=32)
    assert findings("FAIL", trainer="WithBatchNorm") == []


def test_batch_norm_of_the_plan_fails_too(toy, change_plan):
    change_plan(lambda plan: plan["configurations"]["2d"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm2d"))
    assert only("FAIL").message.startswith("BatchNorm2d at 'encoder.")


# ---------------------------------------------------------------------------------------------- counterfactuals

def test_the_fix_for_precomputed_counterfactuals_without_a_store_is_the_import(toy, configure):
    configure(counterfactual__source="precomputed")
    failure = only("FAIL")
    assert "holds no store" in failure.message
    assert failure.fix.startswith("nnunet_cfcl counterfactuals import -d 7 -c 2d -p nnUNetPlans -i ")
    assert f", or set counterfactual.source to acquisition in {toy / 'mine.json'}" in failure.fix


def test_a_complete_store_is_accepted(store):
    assert findings("FAIL") + findings("warn") == []


def test_a_counterfactual_of_the_wrong_shape_is_named_and_no_fault_where_the_store_is_not_used(store, configure):
    store.write("toy_3", "vendorB", np.ones((1, 1, 24, 23), np.float32))
    assert "toy_3__vendorB.b2nd has shape (1, 1, 24, 23), expected (1, 1, 24, 24)" in only("FAIL").message
    configure(counterfactual__source="acquisition")
    assert findings("FAIL") == []


def test_a_counterfactual_of_an_unknown_case_is_named(store):
    store.write("toy_9", "vendorB", np.ones(SHAPE, np.float32))
    assert "toy_9__vendorB.b2nd" in only("FAIL").message


def test_a_counterfactual_missing_in_some_folds_is_a_warning_that_names_the_others(store, toy_cases):
    store.path("toy_5", "vendorB").unlink()
    assert "lacks 1 of 6 files: toy_5__vendorB.b2nd" in only("FAIL").message
    splits = [{"train": CASES[:5], "val": CASES[5:]}, {"train": CASES[1:], "val": CASES[:1]}]
    (toy_cases.parent / "splits_final.json").write_text(json.dumps(splits))
    assert findings("FAIL") == []
    assert only("warn").message.startswith("only fold 0 can be pretrained: ")


def test_without_preprocessed_cases_only_these_are_reported(store, toy_cases):
    for file in toy_cases.iterdir():
        file.unlink()
    assert "no preprocessed cases" in only("FAIL").message


def test_an_unprocessed_pool_fails_with_the_command_that_processes_it(toy, configure):
    images = toy / "nnUNet_raw" / "Dataset007_Toy" / "imagesUn"
    images.mkdir()
    (images / "new_1_0000.png").touch()
    finding = only("FAIL")
    assert "imagesUn" in finding.message and "nnunet_cfcl pool -d 7 -c 2d" in finding.fix
    configure(pretrain__data="training")
    assert not findings("FAIL")


# ---------------------------------------------------------------------------------------------- pool and labels

@pytest.fixture
def make_pool(toy):
    """A function that puts images into imagesUn, labels into labelsSilver, and preprocesses them by our command."""
    raw = toy / "nnUNet_raw" / "Dataset007_Toy"

    def make(images=(), labels=()):
        random = np.random.default_rng(0)
        for folder, names, end in (("imagesUn", [f"{case}_0000" for case in images], 99), ("labelsSilver", labels, 2)):
            (raw / folder).mkdir(exist_ok=True)
            for name in names:
                pixels = random.integers(0, end, (24, 24)).astype(np.uint8)
                io.imsave(raw / folder / f"{name}.png", pixels, check_contrast=False)
        preprocess_pool("7", "2d", log=lambda line: None)

    return make


def test_with_a_pool_the_store_must_hold_its_cases_unless_the_pool_is_left_out(store, make_pool, configure):
    make_pool(["un_0", "un_1"])
    failure = only("FAIL")
    assert "lacks 2 of 8 files: un_0__vendorB.b2nd, un_1__vendorB.b2nd" in failure.message
    assert "pretrain.data to training" in failure.fix and "counterfactuals import -d 7 -c 2d" in failure.fix
    configure(pretrain__data="training")
    assert findings("FAIL") == []
    configure(pretrain__data="training_and_pool")
    for case in ("un_0", "un_1"):
        store.write(case, "vendorB", np.ones(SHAPE, np.float32))
    assert findings("FAIL") + findings("warn") == []
    assert "fold all: phase 1 has 6 training cases and 2 cases of the pool" in [f.message for f in findings("ok")]


def test_with_the_pool_alone_the_store_needs_no_training_cases(store, make_pool, configure):
    make_pool(["un_0"])
    for case in CASES:
        store.path(case, "vendorB").unlink()
    store.write("un_0", "vendorB", np.ones(SHAPE, np.float32))
    configure(pretrain__data="pool")
    assert findings("FAIL") == []
    configure(pretrain__data="training_and_pool")
    assert "lacks 6 of 7 files" in only("FAIL").message


def test_a_pool_that_is_wanted_alone_and_missing_is_a_failure(toy, configure):
    configure(pretrain__data="pool")
    failure = only("FAIL")
    assert failure.message == "pretrain.data is 'pool', but the dataset has no pool"
    assert failure.fix == "put images into nnUNet_raw/Dataset007_Toy/imagesUn and run nnunet_cfcl pool -d 7 -c 2d"


def test_cases_in_both_pool_and_training_set_are_named(make_pool, save_case):
    make_pool(["un_0", "un_1"])
    save_case("un_1", np.random.default_rng(0).normal(size=SHAPE))
    failure = only("FAIL")
    assert failure.message == "1 cases are in both the pool and the training set: un_1"
    assert failure.fix == ("remove or rename them in nnUNet_raw/Dataset007_Toy/imagesUn, then run nnunet_cfcl pool "
                           "-d 7 -c 2d")


def test_a_supervised_method_without_any_label_to_use_is_a_failure(make_pool, configure):
    make_pool(["un_0"])
    configure(pretrain__data="pool")
    assert findings("FAIL") == []
    failure = only("FAIL", trainer="nnUNetTrainerSDVDCL")
    assert "none of the 1 cases of the pool has a silver label of quality 0.7 or more" in failure.message
    assert "labelsSilver" in failure.fix and "nnunet_cfcl pool -d 7 -c 2d" in failure.fix
    configure(pretrain__data="training_and_pool")
    assert findings("FAIL", trainer="nnUNetTrainerSDVDCL") == []


def test_silver_labels_of_training_cases_that_are_wanted_must_be_there_and_preprocessed(toy, make_pool, configure):
    configure(silver__training_cases="silver", pretrain__data="training")
    assert findings("warn") == []
    warning = only("warn", trainer="nnUNetTrainerSDVDCL")
    assert "no training case has a silver label to use" in warning.message and "nnunet_cfcl pool" in warning.fix
    labels = toy / "nnUNet_raw" / "Dataset007_Toy" / "labelsSilver"
    labels.mkdir()
    (labels / "toy_1.png").touch()
    failure = only("FAIL", trainer="nnUNetTrainerSDVDCL")
    assert "labelsSilver has 1 cases that were never preprocessed" in failure.message
    assert failure.fix == "run nnunet_cfcl pool -d 7 -c 2d"


def test_the_doctor_reports_the_labels_that_a_supervised_method_learns_from(make_pool):
    make_pool(["un_0"], ["un_0"])
    assert any(line.message.endswith("labels: 6 manual, 1 silver")
               for line in findings("ok", trainer="nnUNetTrainerSMVDCL"))


def test_the_doctor_warns_of_folds_whose_validation_patients_the_labelling_model_knows(toy, toy_cases, make_pool):
    splits = [{"train": [case for case in CASES if case != out], "val": [out]} for out in CASES[:3]]
    (toy_cases.parent / "splits_final.json").write_text(json.dumps(splits))
    make_pool(["un_0"], ["un_0"])
    assert findings("warn", trainer="nnUNetTrainerSDVDCL") == []
    folder = pool_folder(toy_cases)
    model = SilverModel("nnUNetTrainer", "nnUNetPlans", "2d", "1", "abc", tuple(splits[1]["train"]))
    write_manifest(folder, replace(read_manifest(folder), model=model, model_cases=("un_0",)))
    warning = only("warn", trainer="nnUNetTrainerSDVDCL")
    assert warning.message.startswith("the silver labels are of nnUNetTrainer__nnUNetPlans__2d/fold_1, which was tr")
    assert "validation figures of fold 0, 2 are not independent" in warning.message
    assert warning.fix.endswith("label again with nnunet_cfcl silver -d 7 -c 2d -f FOLD -tr nnUNetTrainer")
    assert findings("warn") == []


def test_the_doctor_writes_nothing(toy, make_pool):
    make_pool(["un_0"])
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    findings("ok")
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*")} == before


# ---------------------------------------------------------------------------------------------- methods

@pytest.mark.parametrize("trainer", ["nnUNetTrainerMAE", "nnUNetTrainerSilverSeg", "nnUNetTrainerVADeR"])
def test_batch_norm_fails_only_where_the_loss_compares_the_samples_of_several_passes(toy, change_plan, trainer):
    change_plan(lambda plan: plan["configurations"]["2d"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm2d"))
    assert len(findings("FAIL", trainer=trainer)) == (trainer == "nnUNetTrainerVADeR")


def test_a_patch_of_a_single_masked_block_fails_for_the_masked_autoencoder(toy, configure):
    configure(baseline__mask_block=16)
    assert findings("FAIL") == []
    failure = only("FAIL", trainer="nnUNetTrainerMAE")
    assert "the patch [16, 16] is a single block" in failure.message and "mine.json" in failure.fix
    configure(baseline__mask_block=8)
    assert findings("FAIL", trainer="nnUNetTrainerMAE") == []


def test_the_views_are_checked_as_the_preset_sets_them(toy, configure, change_plan):
    change_2d(change_plan, patch_size=[8, 8])
    configure(views__crop_fraction=[0.25, 1.0], preset="paper")
    assert "too small for the views" in only("FAIL").message


@pytest.mark.parametrize("trainer", ["nnUNetTrainerCFCLScratch", "nnUNetTrainer"])
def test_a_trainer_without_pretraining_passes_and_is_reported_as_such(toy, change_plan, trainer):
    change_2d(change_plan, patch_size=[8, 8])
    found = findings("FAIL", trainer) + findings("warn", trainer)
    # the toy has no pool, which test_teacher looks at
    assert [one for one in found if "phase 3 will be skipped" not in one.message] == []
    messages = [found.message for found in findings("ok", trainer)]
    assert f"{trainer} has no pretraining, the pretraining settings are ignored" in messages


@pytest.mark.parametrize("trainer", plugin_trainers())
def test_every_trainer_of_the_package_passes_on_a_valid_dataset(toy, trainer):
    found = findings("FAIL", trainer) + findings("warn", trainer)
    # the toy has no pool, which test_teacher looks at
    assert [one for one in found if "phase 3 will be skipped" not in one.message] == []
