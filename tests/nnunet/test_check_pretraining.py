"""Everything that stops a pretraining is said by the doctor, in the words of the training and with what mends it."""

import json
import os

import numpy as np
import pytest

from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root
from nnunet_cfcl.nnunet.doctor import Training, examine
from nnunet_cfcl.nnunet.finding import Finding
from nnunet_cfcl.nnunet.installation import trainers_path

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
    """A sound store of one intervention for all toy cases."""
    made = CounterfactualStore.create(default_store_root(toy_cases) / "mine", ["vendorB"], "a test")
    for case in CASES:
        made.write(case, "vendorB", np.ones(SHAPE, np.float32))
    return made


def findings(status, trainer="nnUNetTrainerDVDCL", configuration="2d") -> list[Finding]:
    asked = Training("7", configuration, trainer=trainer, device="cpu")
    return [found for found in examine(asked) if found.status == status and "memory" not in found.what]


def only(status, **named) -> Finding:
    found = findings(status, **named)
    assert len(found) == 1, [finding.line() for finding in found]
    return found[0]


def change_2d(change_plan, **keys):
    change_plan(lambda plan: plan["configurations"]["2d"].update(keys))


def test_a_sound_configuration_can_be_pretrained(toy):
    assert findings("FAIL") + findings("warn") == []
    found = [finding.what for finding in findings("ok")]
    assert "PlainConvUNet has the decoder to be pretrained" in found
    assert "32 patches per step of pretraining, at most 4 per pass" in found
    assert "counterfactuals for all cases" in found


def test_a_patch_too_small_for_the_views_is_refused_until_the_named_setting_is_changed(toy, change_plan, configure):
    change_2d(change_plan, patch_size=[8, 8])
    failure = only("FAIL")
    assert failure.what.startswith("the patch [8, 8] is too small for the views")
    assert failure.mend.startswith("set views.crop_fraction in a JSON file named by nnUNet_cfcl_config")
    configure(views__crop_fraction=[0.25, 1.0])
    assert findings("FAIL") == []


@pytest.mark.parametrize("switch", ["trainer", "setting"])
def test_what_is_not_pretrained_is_not_checked(toy, change_plan, configure, switch):
    change_2d(change_plan, patch_size=[8, 8])
    if switch == "setting":
        configure(pretrain__enabled=False)
    assert findings("FAIL", "nnUNetTrainer" if switch == "trainer" else "nnUNetTrainerDVDCL") == []


def test_a_trainer_nnunet_does_not_find_yet_is_checked_all_the_same(toy, change_plan, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    change_2d(change_plan, patch_size=[8, 8])
    unknown, patch = findings("FAIL")
    assert unknown.mend.startswith("export nnUNet_extTrainer=") and "too small" in patch.what


def test_a_wrong_setting_is_reported_once(toy, configure):
    configure(pretrain__epoch=3)
    assert "pretrain.epochs" in only("FAIL").what


def test_a_cascades_second_stage_is_refused_and_the_first_named(toy, change_plan):
    change_plan(lambda plan: plan["configurations"].update(
        second={"inherits_from": "2d", "previous_stage": "2d"}))
    failure = only("FAIL", configuration="second")
    assert failure.what.startswith("'second' takes the previous stage's segmentation as input")
    assert failure.mend == "-c 2d, or -tr nnUNetTrainer for this stage"


def external(folder, name, base, body="pass"):
    module, _, base_name = base.rpartition(".")
    (folder / f"{name}.py").write_text(
        f"import torch\nfrom {module} import {base_name}\nfrom nnunet_cfcl.trainers import CounterfactualPretraining\n"
        f"class {name}(CounterfactualPretraining, {base_name}):\n    {body}\n")


NNUNET = "nnunetv2.training.nnUNetTrainer."


def test_a_plan_with_another_architecture_than_the_unets_is_refused(toy, change_plan, monkeypatch):
    from dynamic_network_architectures.architectures import unet
    from torch import nn

    class Strange(unet.PlainConvUNet):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.decoder = nn.Identity()

    monkeypatch.setattr(unet, "Strange", Strange, raising=False)
    change_plan(lambda plan: plan["configurations"]["2d"]["architecture"].update(
        network_class_name="dynamic_network_architectures.architectures.unet.Strange"))
    failure = next(found for found in findings("FAIL") if "decoder" in found.what)
    assert failure.what.startswith("Strange has no decoder of nnU-Net's U-Net kind")
    assert failure.mend == "nnUNetv2_plan_and_preprocess -d 7 -c 2d, then -p nnUNetPlans"


def test_a_trainer_that_builds_a_network_without_our_decoder_is_refused(toy, our_trainers):
    external(our_trainers, "Transformer", f"{NNUNET}nnUNetTrainer.nnUNetTrainer",
             "build_network_architecture = staticmethod(lambda *arguments: torch.nn.Linear(3, 4))")
    failure = only("FAIL", trainer="Transformer")
    assert failure.what.startswith("Linear has no decoder of nnU-Net's U-Net kind")
    assert failure.mend == "derive the trainer from one that builds the plan's own network"


def test_a_network_that_cannot_be_built_on_the_meta_device_is_a_warning(toy, our_trainers):
    external(our_trainers, "NeedsValues", f"{NNUNET}nnUNetTrainer.nnUNetTrainer",
             "build_network_architecture = staticmethod(lambda *arguments: torch.zeros(1).item())")
    assert findings("FAIL", trainer="NeedsValues") == []
    assert only("warn", trainer="NeedsValues").what.startswith("decoder and norms not checked")


def test_batch_norm_with_cached_gradients_is_refused_and_accepted_in_one_pass(toy, our_trainers, configure):
    external(our_trainers, "WithBatchNorm", f"{NNUNET}variants.network_architecture.nnUNetTrainerBN.nnUNetTrainerBN")
    failure = only("FAIL", trainer="WithBatchNorm")
    assert failure.what.startswith("BatchNorm2d at 'encoder.") and "patches_per_pass to 32" in failure.mend
    configure(pretrain__patches_per_pass=32)
    assert findings("FAIL", trainer="WithBatchNorm") == []


def test_batch_norm_of_the_plan_is_refused_too(toy, change_plan):
    change_plan(lambda plan: plan["configurations"]["2d"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm2d"))
    assert only("FAIL").what.startswith("BatchNorm2d at 'encoder.")


# ---------------------------------------------------------------------------------------------- counterfactuals

def test_precomputed_counterfactuals_without_a_store_are_mended_by_the_import(toy, configure):
    configure(counterfactual__source="precomputed")
    failure = only("FAIL")
    assert "holds no store" in failure.what
    assert failure.mend.startswith("nnunet_cfcl counterfactuals import -d 7 -c 2d -p nnUNetPlans -i ")
    assert failure.mend.endswith(f"or set counterfactual.source to acquisition in {toy / 'mine.json'}")


def test_a_sound_store_is_accepted(store):
    assert findings("FAIL") + findings("warn") == []


def test_a_counterfactual_of_the_wrong_shape_is_named_and_no_fault_where_the_store_is_not_used(store, configure):
    store.write("toy_3", "vendorB", np.ones((1, 1, 24, 23), np.float32))
    assert "toy_3__vendorB.b2nd has shape (1, 1, 24, 23), expected (1, 1, 24, 24)" in only("FAIL").what
    configure(counterfactual__source="acquisition")
    assert findings("FAIL") == []


def test_a_counterfactual_of_an_unknown_case_is_named(store):
    store.write("toy_9", "vendorB", np.ones(SHAPE, np.float32))
    assert "toy_9__vendorB.b2nd" in only("FAIL").what


def test_a_counterfactual_missing_in_some_folds_is_a_warning_that_names_the_others(store, toy_cases):
    store.path("toy_5", "vendorB").unlink()
    assert "lacks 1 of 6 files: toy_5__vendorB.b2nd" in only("FAIL").what
    splits = [{"train": CASES[:5], "val": CASES[5:]}, {"train": CASES[1:], "val": CASES[:1]}]
    (toy_cases.parent / "splits_final.json").write_text(json.dumps(splits))
    assert findings("FAIL") == []
    assert only("warn").what.startswith("only fold 0 can be pretrained: ")


def test_without_preprocessed_cases_only_these_are_missed(store, toy_cases):
    for file in toy_cases.iterdir():
        file.unlink()
    assert "no preprocessed cases" in only("FAIL").what
