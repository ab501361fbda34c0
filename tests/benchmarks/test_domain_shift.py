"""Domain shift study: split of the patients, data shared between runs, and results against plain computations."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from arms import ARMS
from PIL import Image
from presets import PRESETS
from results import Cases, Finished, collect, difference, sides, table_of_differences, table_of_means
from scipy.stats import t
from study import PLANS, OutOfTime, Run, Study, make_generated, runs_of, work_on
from study_data import DATASETS, DEVELOPMENT, REPORT, split_chest_x_rays, split_hippocampi

from nnunet_cfcl import trainers
from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.store import GENERATED, CounterfactualStore
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.statistics import Draws
from nnunet_cfcl.files.hashing import digest

HALVES = (DEVELOPMENT, REPORT)


def x_rays() -> list[dict[str, str]]:
    """Patients with one image, and two images of every fifth."""
    rows = []
    for scanner, count in (("eureka_cr", 100), ("philips_dr", 150)):
        for number in range(count):
            for image in range(2 if number % 5 == 0 else 1):
                rows.append({"case": f"{scanner}_{number}_{image}", "patient": f"{scanner}_{number}",
                             "scanner": scanner, "disease": ("normal", "tb")[number % 2]})
    return rows


@pytest.mark.parametrize("split", [
    lambda budget: split_chest_x_rays(x_rays(), budget),
    lambda budget: split_hippocampi([f"h{number:03d}" for number in range(100)], budget),
])
def test_no_patient_is_in_two_parts_and_budgets_share_the_test_patients(split):
    patients = [{part: {row["patient"] for row in rows} for part, rows in split(budget).items()} for budget in (6, 12)]
    for parts in patients:
        named = list(parts.values())
        assert sum(map(len, named)) == len(set.union(*named))
    for half in HALVES:
        assert patients[0][half] == patients[1][half]
    assert patients[0]["labelled"] < patients[1]["labelled"]


def test_labelled_cases_are_of_one_scanner_and_all_other_cases_of_both():
    split = split_chest_x_rays(x_rays(), 12)
    assert {row["scanner"] for row in split["labelled"]} == {"eureka_cr"}
    for part in ("pool", *HALVES):
        groups = {(row["scanner"], row["disease"]) for row in split[part]}
        assert len(groups) == 4
    hippocampi = split_hippocampi([f"h{number:03d}" for number in range(100)], 12)
    assert {row["scanner"] for row in hippocampi["labelled"]} == {"original"}
    for half in HALVES:
        shown = [{row["patient"] for row in hippocampi[half] if row["scanner"] == scanner}
                 for scanner in ("original", "simulated")]
        assert shown[0] == shown[1]


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_trainer_with_valid_settings(name):
    arm = ARMS[name]
    assert hasattr(trainers, arm.trainer)
    resolve_settings(dict(arm.settings))


@pytest.mark.parametrize("key", PRESETS)
def test_every_preset_has_known_arms_and_valid_settings(key):
    preset = PRESETS[key]
    assert set(preset.arms) <= ARMS.keys() and preset.arms[0] == "Scratch"
    resolve_settings({**preset.settings, "generator": preset.generator})


@pytest.fixture
def study(tmp_path) -> Study:
    """Study with a plan, whose commands are not executed."""
    dataset = DATASETS["chest_xrays"]
    folder = tmp_path / "preprocessed" / dataset.folder(12)
    folder.mkdir(parents=True)
    raw = tmp_path / "raw" / dataset.folder(12)
    raw.mkdir(parents=True)
    (raw / "test.csv").write_text("case\n")
    (folder / f"{PLANS}.json").write_text(json.dumps({"configurations": {"2d": {"batch_size": 8}}}))
    return Study(dataset, PRESETS["nano", "chest_xrays"], tmp_path, tmp_path, "cpu", 1, 1e12, {})


def test_arms_share_seed_fine_tuning_and_evaluation(study):
    runs = list(runs_of(study, list(PRESETS["nano", "chest_xrays"].arms), [12], [0, 1]))
    for run in runs:
        settings = run.settings()
        assert settings["seed"] == run.seed
        # settings in which these arms differ
        kept = {key: value for key, value in settings["finetune"].items()
                if key not in ("acquisition_probability", "counterfactual_probability")}
        if not run.arm.longer:
            assert kept == PRESETS["nano", "chest_xrays"].settings["finetune"]
        assert settings["finetune"]["mirror_axes"] == [] and settings["finetune"]["rotation_deg"] == 15


def test_the_longer_training_processes_the_patches_of_pretraining_and_fine_tuning(study):
    names = ("DVDCL@acquisition", "ScratchLong")
    pretrained, longer = (Run(study, name, ARMS[name], 12, 0).settings() for name in names)
    one, other = pretrained["pretrain"], pretrained["finetune"]
    patches = one["epochs"] * one["iterations_per_epoch"] * one["images_per_step"] * 2
    patches += other["epochs"] * other["iterations_per_epoch"] * 8
    assert longer["finetune"]["epochs"] * longer["finetune"]["iterations_per_epoch"] * 8 == patches


@pytest.fixture
def generating(study, monkeypatch):
    """Study, its calls, and ``passed``: the command creates a store with these interventions beside an older store."""
    study = replace(study, preset=replace(study.preset, generator={"epochs": 7}), changes={"generator.width": 8})
    stores = study.root / "preprocessed" / study.dataset.folder(12) / "plan_cfcl_cf"
    CounterfactualStore.create(stores / "older", ["scanner"], f"{GENERATED}old", "plan", "any")
    calls, passed = [], ["disease", "scanner+disease"]

    def call(self, log, environment, *command):
        assert command[:3] == ("nnunet_cfcl", "generator", "generate")
        calls.append(json.loads(Path(environment["nnUNet_cfcl_config"]).read_text()))
        if passed:
            CounterfactualStore.create(stores / "made", passed, f"{GENERATED}new", "plan", "any")
        said = f"The counterfactuals are in {stores / 'made'}" if passed else "Nothing is generated"
        with open(log, "a") as file:
            file.write(f"\n$ {' '.join(command)}\n{said}\n")

    monkeypatch.setattr(Study, "call", call)
    return study, calls, passed


def test_a_generator_is_trained_once_and_every_arm_uses_its_counterfactuals(generating):
    study, calls, _ = generating
    make_generated(study, 12)
    make_generated(study, 12)
    (settings,) = calls
    assert settings["generator"] == {"epochs": 7, "width": 8} and settings["counterfactual"]["source"] == "generator"
    store = str(study.root / "preprocessed" / study.dataset.folder(12) / "plan_cfcl_cf" / "made")
    for name in ("DVDCL@generator", "ScratchCF@generator", "DVDCL@generator+CF"):
        run = Run(study, name, ARMS[name], 12, 0)
        own, given = run.settings(), run._with_files(run.settings())
        assert own["generator"] == {"epochs": 7, "width": 8}
        assert given["counterfactual"] == {**own["counterfactual"], "source": "precomputed", "store": store}
        resolve_settings(given)
        made = run.identity()["generated"]
        assert made["source"] == f"{GENERATED}new" and made["interventions"] == ["disease", "scanner+disease"]
        assert str(study.root) not in json.dumps(run.identity()) and not run.has_no_generator()
    other = Run(replace(study, changes={}), "DVDCL@acquisition", ARMS["DVDCL@acquisition"], 12, 0)
    assert "generator" not in other.settings() and "generated" not in other.identity()
    assert other._with_files(other.settings()) == other.settings()


def test_counterfactuals_of_a_generator_with_other_settings_are_not_used(generating):
    study, calls, _ = generating
    make_generated(study, 12)
    with pytest.raises(RuntimeError, match="other settings"):
        make_generated(replace(study, changes={"generator.width": 64}), 12)
    assert len(calls) == 1


@pytest.mark.parametrize("names", [[], ["disease"]])
def test_arms_without_the_generator_run_where_no_change_of_the_scanner_passes_its_gate(
        generating, names, monkeypatch, capsys):
    study, calls, passed = generating
    passed[:] = names
    make_generated(study, 12)
    make_generated(study, 12)
    assert len(calls) == 1
    done = []
    monkeypatch.setattr(Run, "work", lambda run: done.append(run.name))
    work_on(study, list(runs_of(study, ["DVDCL@generator", "Scratch"], [12], [0])), 0, 1)
    assert done == ["Scratch"] and "Left out: DVDCL@generator_12_0, for the gate" in capsys.readouterr().out


def test_a_folder_of_a_run_with_other_settings_is_an_error(study):
    run = Run(study, "Scratch", ARMS["Scratch"], 12, 0)
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps({"hash": digest(run.identity())}))
    run.check_identity()
    changed = replace(run, study=replace(study, changes={"finetune.epochs": 30}))
    with pytest.raises(RuntimeError, match="holds a run with other settings"):
        changed.check_identity()


def test_other_parts_wait_for_the_files_of_part_0(study):
    for name, what in (("SilverSeg", "silver"), ("DVDCL@precomputed", "true counterfactuals"),
                       ("DVDCL@generator", "generator's")):
        with pytest.raises(RuntimeError, match=f"needs the {what}"):
            Run(study, name, ARMS[name], 12, 0).work()


def test_a_killed_prediction_is_repeated(study, monkeypatch):
    run, calls = Run(study, "Scratch", ARMS["Scratch"], 12, 0), []
    target = run.folder / "predictions"

    def predict(self, log, environment, *command):
        folder = Path(command[command.index("-o") + 1])
        assert not folder.exists()
        folder.mkdir(parents=True)
        (folder / "a.png").write_text("half" if not calls else "whole")
        calls.append(command)
        if len(calls) == 1:
            raise OutOfTime

    monkeypatch.setattr(Study, "call", predict)
    with pytest.raises(OutOfTime):
        run._predict({}, (), study.root, target)
    run._predict({}, (), study.root, target)
    run._predict({}, (), study.root, target)
    assert len(calls) == 2 and (target / "a.png").read_text() == "whole"


def finished(arm: str, seed: int, values) -> Finished:
    return Finished(arm, seed, "hash", {"dice": np.asarray(values, float)}, 60.0)


def test_a_difference_is_paired_by_seed_and_case():
    random = np.random.default_rng(0)
    cases = Cases(tuple("abcdef"), tuple("abcdef"), np.array(["own"] * 6), np.array(["own"] * 6))
    baseline, arm = (random.normal(90, 5, (3, 6)) for _ in range(2))
    mask = np.array([True, True, True, True, True, False])
    # in another order, and with a seed that the baseline lacks
    runs = [finished("arm", seed, arm[seed]) for seed in (2, 0, 1)] + [finished("arm", 7, [0] * 6)]
    one = difference(runs, [finished("Scratch", seed, baseline[seed]) for seed in range(3)], mask, cases, Draws(0))
    assert one is not None
    table = (arm - baseline)[:, :5]
    assert one.mean == pytest.approx(table.mean())
    np.testing.assert_allclose(sorted(one.of_seeds), sorted(table.mean(1)))
    half = t.ppf(0.975, 2) * np.std(table.mean(1), ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(one.seeds, [table.mean() - half, table.mean() + half])
    assert one.patients[0] < table.mean() < one.patients[1]
    assert difference(runs, [], mask, cases, Draws(0)) is None


def test_swapped_lungs_are_detected_and_do_not_change_the_dice_of_both_as_one_label(tmp_path):
    truth = np.zeros((20, 20), np.uint8)
    truth[4:16, 2:8], truth[4:16, 12:18] = 1, 2
    swapped = np.where(truth > 0, 3 - truth, 0).astype(np.uint8)
    half = truth.copy()
    half[4:10] = 0
    for folder, mask in (("truth", truth), ("right", truth), ("swapped", swapped), ("half", half)):
        (tmp_path / folder).mkdir()
        Image.fromarray(mask).save(tmp_path / folder / "a.png")
    expected = {"right": (100.0, 0.0), "swapped": (100.0, 1.0), "half": (100 * 2 * 72 / (72 + 144), 0.0)}
    for folder, (binary, crossed) in expected.items():
        found = sides(tmp_path / folder, tmp_path / "truth", ["a"])
        assert (found["binary"][0], found["swapped"][0]) == pytest.approx((binary, crossed))


def write_run(root: Path, arm: str, seed: int, dice: dict[str, float]) -> None:
    folder = root / "runs" / f"{arm}_12_{seed}"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "hash": "h"}))
    (folder / "seconds.txt").write_text("30\n30\n")
    with open(folder / "evaluation" / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", "label", "dice", "hd95_mm"])
        table.writerows([case, label, value, 1.5] for case, value in dice.items() for label in (1, 2))


def test_tables_use_only_the_files_of_the_report_half(tmp_path):
    dataset = DATASETS["hippocampus"]
    raw = tmp_path / "raw" / dataset.folder(12)
    raw.mkdir(parents=True)
    rows = [(f"{patient}_{scanner}", patient, scanner, "none", half)
            for patient, half in (("a", REPORT), ("b", REPORT), ("c", DEVELOPMENT))
            for scanner in ("original", "simulated")]
    with open(raw / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([("case", "patient", "scanner", "disease", "half"), *rows])
    for arm, gain in (("Scratch", 0.0), ("DVDCL@acquisition", 0.1)):
        for seed in (0, 1):
            write_run(tmp_path, arm, seed, {case: (0.1 if half == DEVELOPMENT else 0.8 if scanner == "original" else
                                                   0.5 + gain) for case, _, scanner, _, half in rows})
    results = collect(tmp_path, dataset, 12, list(ARMS), REPORT)
    assert list(results.runs) == ["Scratch", "DVDCL@acquisition"]
    means = table_of_means(results)
    assert "| Scratch | 2 | 80.00 ± 0.00 | 50.00 ± 0.00 | 50.00 (simulated) | 1.5 | 0.0 % | 1.0 |" in means
    assert "| DVDCL@acquisition | 2 | 80.00 ± 0.00 | 60.00 ± 0.00 | 60.00 (simulated) |" in means
    assert "| DVDCL@acquisition | simulated | +10.00 |" in table_of_differences(results, "Scratch")
    assert table_of_differences(results, "ScratchAug") == ""
    metrics = tmp_path / "runs" / "Scratch_12_0" / "evaluation" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace(",1.5", ",nan"))  # this seed missed all labels
    assert "| 50.00 (simulated) | 1.5 | 50.0 % |" in table_of_means(collect(tmp_path, dataset, 12, list(ARMS), REPORT))
    metrics.write_text("case,label,dice,hd95_mm\n")
    with pytest.raises(UserError, match="no figures of 4 test cases"):
        collect(tmp_path, dataset, 12, list(ARMS), REPORT)
