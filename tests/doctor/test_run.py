"""Every fault that the doctor detects, provoked in a toy dataset: the line it prints and the fix it names."""

import importlib.metadata
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nnunet_cfcl.cli import main
from nnunet_cfcl.doctor import device as check_device
from nnunet_cfcl.doctor import environment
from nnunet_cfcl.doctor.cases import channel_fault
from nnunet_cfcl.doctor.run import Training, examine
from nnunet_cfcl.errors import CheckResult
from nnunet_cfcl.nnunet.compatibility import version_numbers
from nnunet_cfcl.nnunet.installation import trainers_path
from nnunet_cfcl.trainers import lookup


def findings(status, configuration="2d", dataset="7", scan=False, **training):
    """The results of one status that the doctor reports for the toy dataset."""
    asked = Training(dataset, configuration, **{"trainer": "nnUNetTrainer", "device": "cpu", **training})
    return [finding for finding in examine(asked, scan) if finding.status == status]


def only_failure(*arguments, **named) -> CheckResult:
    failures = findings("FAIL", *arguments, **named)
    assert len(failures) == 1, [finding.line() for finding in failures]
    return failures[0]


def test_a_valid_dataset_passes_every_check(toy):
    assert findings("FAIL", scan=True) == []
    assert [finding.message for finding in findings("warn", scan=True) if "memory" not in finding.message] == []


@pytest.mark.parametrize("name", ["7", "007", "Dataset007_Toy"])
def test_a_dataset_is_given_by_number_or_name_as_in_nnunet(toy, name):
    assert "dataset Dataset007_Toy" in [finding.message for finding in findings("ok", dataset=name)]


def test_the_exit_status_is_zero_if_nothing_failed_and_one_otherwise(toy, capsys):
    arguments = ["doctor", "-d", "7", "-c", "2d", "-tr", "nnUNetTrainer", "-device", "cpu"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("nothing failed\n")
    assert main([*arguments, "-p", "nnUNetPlanz"]) == 1
    assert capsys.readouterr().out.endswith("1 checks failed\n")


def test_with_nothing_set_up_the_doctor_names_the_variables_instead_of_failing_itself():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    shown = subprocess.run([sys.executable, "-m", "nnunet_cfcl", "doctor", "-d", "4", "-c", "2d", "-device", "cpu"],
                           env=environment, capture_output=True, text=True)
    assert shown.returncode == 1
    assert "Traceback" not in shown.stderr
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        assert f"fix: export {variable}=" in shown.stdout
    assert "fix: export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)" in shown.stdout


def test_every_result_is_one_line():
    assert CheckResult("FAIL", "two\nlines", "a\ncommand").line() == "FAIL  two lines; fix: a command"
    assert CheckResult("ok", "fine").line() == "ok    fine"


def test_scanning_needs_a_dataset_and_a_configuration(capsys):
    assert main(["doctor", "--data", "-d", "7"]) == 1
    assert "fix: add -d and -c" in capsys.readouterr().err


def test_a_check_that_raises_is_reported_and_the_others_still_run(toy, monkeypatch):
    monkeypatch.setattr(lookup, "look_up_trainer", lambda name: 1 / 0)
    failure = only_failure()
    assert "the trainer could not be checked (ZeroDivisionError" in failure.message
    assert any(finding.message.startswith("6 preprocessed cases") for finding in findings("ok"))


# ---------------------------------------------------------------------------------------------- versions

@pytest.mark.parametrize(("version", "numbers"), [("2.8.1", (2, 8, 1)), ("2.15.0+cu132", (2, 15, 0)),
                                                  ("3.0rc1", (3, 0)), ("2.9.dev3", (2, 9)), ("10", (10,))])
def test_the_numbers_of_a_version(version, numbers):
    assert version_numbers(version) == numbers


@pytest.mark.parametrize(("version", "status"), [("2.5.9", "FAIL"), ("2.6", "ok"), ("2.10.1", "ok"), ("3.0.0", "FAIL"),
                                                 ("3", "FAIL")])
def test_nnunet_must_be_of_a_supported_version(version, status, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    found = environment.check_nnunet()
    assert found.status == status
    assert status == "ok" or found.fix == "pip install 'nnunetv2>=2.6,<3'"


def test_a_torchvision_that_does_not_match_torch_is_reported_with_both_versions(monkeypatch):
    import torchvision

    def fail(*arguments):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(torchvision.ops, "nms", fail)
    found = environment.check_torch()
    assert found.status == "FAIL"
    assert "operator torchvision::nms does not exist" in found.message and "more" not in found.message
    assert f"torch {importlib.metadata.version('torch')}" in found.message
    assert "pip install --force-reinstall torch torchvision" in found.fix


def test_torch_and_torchvision_of_different_builds_are_a_warning(monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision, "__version__", "0.29.2+rocm7")
    assert environment.check_torch().status == "warn"


def test_a_missing_torchvision_is_a_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert environment.check_torch().status == "FAIL"


# ---------------------------------------------------------------------------------------------- folders

def test_a_results_folder_that_nnunet_will_create_is_only_a_warning(toy, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(toy / "new"))
    warning, = (finding for finding in findings("warn") if "nnUNet_results" in finding.message)
    assert f"mkdir -p {toy / 'new'}" in warning.fix


def test_a_file_in_the_place_of_a_folder_is_a_failure(toy, monkeypatch):
    (toy / "file").touch()
    monkeypatch.setenv("nnUNet_results", str(toy / "file"))
    assert "is not an existing folder" in only_failure().message


def test_a_folder_that_cannot_be_written_is_a_failure(toy, monkeypatch):
    results = os.environ["nnUNet_results"]
    monkeypatch.setattr(os, "access", lambda folder, mode: str(folder) != results)
    assert only_failure().fix == f"chmod u+w {results}"


# ---------------------------------------------------------------------------------------------- the trainer

def test_our_trainer_is_found_through_the_variable_and_reported_with_its_installed_module(toy, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_path()))
    found = lookup.check_trainer("nnUNetTrainerDVDCL")
    assert found.status == "ok"
    assert "nnunet_cfcl.trainers" in found.message


def test_the_fix_for_our_trainer_without_the_variable_is_to_set_it(toy):
    assert only_failure(trainer="nnUNetTrainerDVDCL").fix == "export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)"


def test_folders_already_in_the_variable_are_kept_and_missing_ones_named(toy, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", f"{toy}{os.pathsep}/nowhere")
    failure = only_failure(trainer="nnUNetTrainerDVDCL")
    assert "names /nowhere, which does not exist" in failure.message
    assert failure.fix == f"export nnUNet_extTrainer={toy}{os.pathsep}$(nnunet_cfcl trainers-path)"


@pytest.mark.parametrize(("misspelt", "nearest"), [("nnUNetTrainer_250epoch", "nnUNetTrainer_250epochs"),
                                                   ("nnUNetTrainerDA55", "nnUNetTrainerDA5")])
def test_the_fix_for_a_misspelt_trainer_is_the_closest_name(toy, misspelt, nearest):
    assert only_failure(trainer=misspelt).fix == f"-tr {nearest}"


def test_the_fix_for_a_misspelt_trainer_of_ours_is_the_closest_name_and_the_variable(toy):
    assert only_failure(trainer="nnUNetTrainerDVDCl").fix == (
        "-tr nnUNetTrainerDVDCL, after export nnUNet_extTrainer=$(nnunet_cfcl trainers-path)")


def test_a_class_that_is_not_a_trainer_is_a_failure(toy, monkeypatch):
    (toy / "external").mkdir()
    (toy / "external" / "no_trainer.py").write_text("class NoTrainer:\n    pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(toy / "external"))
    assert only_failure(trainer="NoTrainer").fix == "derive the class from nnUNetTrainer"


# ---------------------------------------------------------------------------------------------- dataset and plan

@pytest.mark.parametrize("name", ["8", "Dataset007_Toyy", "toy"])
def test_the_fix_for_an_unknown_dataset_is_the_closest_name(toy, name):
    assert only_failure(dataset=name).fix == "-d Dataset007_Toy"


def test_two_datasets_of_one_number_are_ambiguous_even_if_one_has_only_results(toy):
    (toy / "nnUNet_results" / "Dataset007_Other").mkdir()
    assert "Dataset007_Other, Dataset007_Toy" in only_failure().message
    assert findings("FAIL", dataset="Dataset007_Toy") == []


@pytest.mark.parametrize(("plans", "command"), [
    ("nnUNetPlans", "nnUNetv2_plan_and_preprocess -d 7 -c 2d"),
    ("nnUNetResEncUNetLPlans", "nnUNetv2_plan_and_preprocess -d 7 -c 2d -pl nnUNetPlannerResEncL")])
def test_the_fix_for_a_missing_plan_is_nnunets_own_command(toy, toy_cases, plans, command):
    (toy_cases.parent / "nnUNetPlans.json").unlink()
    assert only_failure(plans=plans).fix == command


def test_the_planning_command_avoids_the_setting_that_breaks_nnunets_planner(toy, toy_cases, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    (toy_cases.parent / "nnUNetPlans.json").unlink()
    assert only_failure().fix.startswith("env -u nnUNet_n_proc_DA nnUNetv2_plan_and_preprocess ")


def test_the_fix_for_a_misspelt_plan_is_the_closest_name(toy):
    failure = only_failure(plans="nnUNetPlan")
    assert failure.fix == "-p nnUNetPlans"
    assert failure.message.endswith("(found: nnUNetPlans)")


@pytest.mark.parametrize("name", ["nnUNetPlans.json", "dataset.json"])
def test_a_damaged_file_beside_the_cases_is_named(toy, toy_cases, name):
    (toy_cases.parent / name).write_text("{")
    failure = only_failure()
    assert failure.message.endswith(f"{name} is missing or not readable")
    assert failure.fix.startswith("nnUNetv2_plan_and_preprocess -d 7")


def test_the_fix_for_a_misspelt_configuration_is_the_closest_name(toy):
    failure = only_failure(configuration="2d_smal")
    assert failure.fix == "-c 2d_small"
    assert "2d, 2d_small" in failure.message


def test_a_configuration_that_inherits_uses_the_inherited_cases_and_its_own_settings(toy):
    found = [finding.message for finding in findings("ok", configuration="2d_small")]
    assert "configuration 2d_small, patch [16, 16], batch 2" in found
    assert any(what.startswith("settings: 3 epochs") for what in found)
    assert any(what.startswith("6 preprocessed cases") for what in found)


def test_without_a_configuration_the_plans_configurations_are_listed(toy):
    assert "plan nnUNetPlans with configurations 2d, 2d_small" in [
        finding.message for finding in findings("ok", configuration=None)]


# ---------------------------------------------------------------------------------------------- preprocessed data

PREPROCESS = "nnUNetv2_preprocess -d 7 -plans_name nnUNetPlans -c 2d"


def test_the_fix_for_a_configuration_that_was_never_preprocessed_is_nnunets_command(toy, toy_cases):
    toy_cases.rename(toy_cases.with_name("elsewhere"))
    assert only_failure().fix == PREPROCESS


def test_raw_cases_that_were_not_preprocessed_are_listed(toy, toy_cases):
    for file in toy_cases.glob("toy_3*"):
        file.unlink()
    failure = only_failure()
    assert failure.message.startswith("1 training cases are missing") and failure.message.endswith(": toy_3")
    assert failure.fix == PREPROCESS


def test_training_without_the_raw_dataset_is_fine(toy, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert findings("FAIL") == []


def test_foreign_files_among_the_cases_are_reported_by_type(toy, toy_cases):
    (toy_cases / "notes.txt").touch()
    assert ".b2nd, .txt" in only_failure().message


def test_a_split_may_only_name_preprocessed_cases(toy, toy_cases):
    file = toy_cases.parent / "splits_final.json"
    file.write_text(json.dumps([{"train": ["toy_0", "toy_9"], "val": ["toy_1"]}]))
    failure = only_failure()
    assert failure.message.endswith(": toy_9") and f"rm {file}" in failure.fix
    file.write_text(json.dumps([{"train": ["toy_0"], "val": ["toy_1"]}]))
    assert "splits_final.json with 1 fold" in [finding.message for finding in findings("ok")]


@pytest.mark.parametrize("content", ["{", "[1]", '{"train": []}', '[{"train": []}]'])
def test_a_malformed_split_is_a_failure(toy, toy_cases, content):
    (toy_cases.parent / "splits_final.json").write_text(content)
    assert "not a list of folds" in only_failure().message


def test_too_few_cases_for_nnunets_own_split_are_a_failure(toy, toy_cases, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    for case in ("toy_4", "toy_5"):
        for file in toy_cases.glob(f"{case}*"):
            file.unlink()
    assert "cannot split 4 cases into five folds" in only_failure().message


# ---------------------------------------------------------------------------------------------- settings

def test_an_unknown_key_in_the_settings_file_names_the_file_to_edit(toy, monkeypatch):
    (toy / "mine.json").write_text('{"pretrain": {"epoch": 3}}')
    monkeypatch.setenv("nnUNet_cfcl_config", str(toy / "mine.json"))
    failure = findings("FAIL")[0]
    assert "pretrain.epoch'" in failure.message and "pretrain.epochs" in failure.fix
    assert failure.fix.startswith(f"edit {toy / 'mine.json'}")


def test_the_fix_for_a_wrong_value_in_the_plans_block_is_to_edit_the_plan(toy, change_plan):
    change_plan(lambda plan: plan["configurations"]["2d"].update(cfcl={"pretrain.epochs": "many"}))
    assert findings("FAIL")[0].fix == "edit the plan"


def test_settings_are_checked_without_a_dataset_too(toy, monkeypatch):
    monkeypatch.setenv("nnUNet_cfcl_config", "/nowhere.json")
    assert any("/nowhere.json" in finding.message for finding in findings("FAIL", dataset=None))


# ---------------------------------------------------------------------------------------------- the scan

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_voxel_that_is_not_finite_fails_its_case(toy, save_case, value):
    image = np.random.default_rng(1).normal(size=(1, 1, 24, 24))
    image[0, 0, 3, 4] = value
    save_case("toy_2", image)
    assert findings("FAIL") == []
    case, count = findings("FAIL", scan=True)
    assert case.message == "case toy_2: channel 0 has 1 voxels that are not finite (NaN or infinite)"
    assert PREPROCESS in case.fix
    assert count.message == "6 cases scanned, 1 failed"


def test_a_constant_image_is_a_failure_and_a_constant_channel_a_warning(toy, save_case):
    save_case("toy_1", np.full((1, 1, 24, 24), 0.5))
    two_channels = np.random.default_rng(1).normal(size=(2, 1, 24, 24))
    two_channels[1] = 0
    save_case("toy_3", two_channels)
    assert findings("FAIL", scan=True)[0].message == "case toy_1 has no contrast: channel 0 is constant at 0.5"
    assert "case toy_3: channel 1 is constant at 0" in [finding.message for finding in findings("warn", scan=True)]


def test_a_case_that_cannot_be_read_is_reported_and_the_scan_continues(toy, toy_cases, save_case):
    (toy_cases / "toy_0.b2nd").write_bytes(b"damaged")
    save_case("toy_5", np.zeros((1, 1, 24, 24)))
    damaged, constant, count = findings("FAIL", scan=True)
    assert damaged.message.startswith("case toy_0 cannot be read")
    assert constant.message.startswith("case toy_5")
    assert count.message == "6 cases scanned, 2 failed"


@pytest.mark.parametrize(("values", "fault"), [([1.0, 2.0], None), ([2.0, 2.0], "is constant at 2"),
                                               ([], "has no voxels"),
                                               ([np.nan, np.nan], "has 2 voxels that are not finite (NaN or infinite)"),
                                               ([np.inf, 1.0], "has 1 voxels that are not finite (NaN or infinite)")])
def test_faults_of_a_channel(values, fault):
    assert channel_fault(np.array(values, np.float32)) == fault


# ---------------------------------------------------------------------------------------------- device and memory

def test_a_device_that_is_not_available_is_a_failure(toy, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "-device cpu" in only_failure(device="cuda").fix


@pytest.mark.parametrize(("free", "status"), [(1.0, "warn"), (1e6, "ok"), (None, "warn")])
def test_little_or_unknown_memory_is_a_warning(free, status, monkeypatch):
    monkeypatch.setattr(check_device, "free_memory_gib", lambda: free)
    found, = check_device.check_memory("cpu", 1.0)
    assert found.status == status


def test_free_memory_is_positive_and_no_more_than_the_machine_has():
    free = check_device.free_memory_gib()
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def test_the_memory_estimate_equals_nnunets_planner_and_grows_with_the_batch(toy, change_plan):
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    from nnunet_cfcl.nnunet.lookup import load_configuration, load_plan

    block = load_configuration(load_plan("Dataset007_Toy", "nnUNetPlans", "2d"), "nnUNetPlans", "2d")
    architecture = block["architecture"]
    elements = ExperimentPlanner.static_estimate_VRAM_usage(
        (16, 16), 1, 2, architecture["network_class_name"], architecture["arch_kwargs"],
        architecture["_kw_requires_import"])
    need = check_device.training_gib(block, 1, 2)
    assert need == pytest.approx(8 * elements / 85e6 * 4 / 12)
    assert check_device.training_gib({**block, "batch_size": 8}, 1, 2) == pytest.approx(2 * need)
