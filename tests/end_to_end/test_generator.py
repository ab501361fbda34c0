"""Phase 0 by the real commands: a generator of counterfactuals on chest X-rays of two scanners, then phases 1 and 2."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.trainers import nnUNetTrainerDVDCL, nnUNetTrainerMVDCL
from tests.end_to_end.conftest import PLANS, TRAINER, NnUNet

pytestmark = pytest.mark.end_to_end

DATASET = "Dataset012_ChestXraysPool"
GENERATOR = {"epochs": 2, "iterations_per_epoch": 2, "images_per_step": 2, "width": 8, "blocks": 1,
             "finetune_epochs": 1, "samples_every": 1}
GATE = {"predictor_steps": 5, "segmenter_steps": 2, "cases": 8}
ALONE = {"source": "auto", "count": 2, "interventions": ["scanner"]}
#: So short a training makes no effective generator; it is used all the same.
TRUSTED = {"counterfactual": ALONE, "generator": GENERATOR, "gate": {**GATE, "enabled": False}}
TRAIN = ("nnUNetv2_train", "12", "2d", "0", "-p", PLANS, "-device", "cpu")
COMMAND = ("-d", "12", "-c", "2d", "-p", PLANS, "-f", "0", "-device", "cpu")


@pytest.fixture(scope="module")
def x_rays(chest_xrays_with_pool, tmp_path_factory) -> NnUNet:
    """Folders of their own: the tests write attributes and stores."""
    nnunet = chest_xrays_with_pool.copy(tmp_path_factory.mktemp("generator"))
    nnunet.settings(**TRUSTED)
    return nnunet


def _attributes(nnunet: NnUNet) -> Path:
    return nnunet.folder("raw") / DATASET / "attributes.csv"


def _generators(nnunet: NnUNet) -> list[Path]:
    return sorted((nnunet.folder("results") / DATASET / "cfcl_generators").iterdir())


def _stores(nnunet: NnUNet) -> list[Path]:
    return sorted(nnunet.folder("preprocessed").glob(f"{DATASET}/*_cfcl_cf/*/manifest.json"))


def test_dvd_cl_trains_its_generator_is_killed_goes_on_generates_pretrains_and_fine_tunes(x_rays):
    x_rays.run_until("Generator training epoch 0", *TRAIN, "-tr", TRAINER)
    output = x_rays.run_until("Training done", *TRAIN, "-tr", TRAINER, "--c")
    assert "Generator training resumes after epoch 0" in output
    assert "Gate, intervention 'scanner'" in output and "counterfactuals: generator" in output
    assert "Phase 1 done" in output
    fold = x_rays.fold(DATASET, "2d")
    report = fold / "cfcl" / "generator" / "report"
    assert {file.name for file in report.iterdir()} == {
        "report.json", "report.md", "contact_sheet.png", "figures.png"}
    (generator,) = _generators(x_rays)
    assert {"generator.pth", "progress.png", "log.jsonl", "samples_epoch_0002.png"} <= {
        file.name for file in generator.iterdir()}
    (manifest,) = _stores(x_rays)
    cases = json.loads((fold / "cfcl" / "config.json").read_text())["pretraining"]["cases"]
    assert {file.name for file in (manifest.parent / "cases").iterdir()} == {f"{case}__scanner.b2nd" for case in cases}


def test_mvd_cl_and_the_commands_find_the_generator_and_its_counterfactuals(x_rays, run_here):
    before = _generators(x_rays), [file.stat().st_mtime_ns for file in _stores(x_rays)]
    output = x_rays.run_until("Phase 1 done", *TRAIN, "-tr", "nnUNetTrainerMVDCL")
    assert "The generator was trained before" in output and "counterfactuals: generator" in output
    assert "The generator was trained before" in run_here(x_rays, "nnunet_cfcl", "generator", "train", *COMMAND)
    assert "report.md" in run_here(x_rays, "nnunet_cfcl", "generator", "report", *COMMAND)
    assert str(_stores(x_rays)[0].parent) in x_rays.run("nnunet_cfcl", "generator", "generate", *COMMAND)
    assert _generators(x_rays) == before[0] and len(_stores(x_rays)) == 1


def test_a_finished_pretraining_needs_neither_its_generator_nor_its_store(x_rays, trainers_of, tmp_path, capsys):
    make = trainers_of(x_rays, DATASET, "2d")
    chosen = {**TRUSTED, "counterfactual": {**ALONE, "abduction": "sample"}}
    make(nnUNetTrainerDVDCL, **chosen).run_training()
    assert capsys.readouterr().out.count("phase 1 has") == 1
    (store,) = [file.parent for file in _stores(x_rays) if "abduction: sample" in file.read_text()]
    shutil.rmtree(store)
    shutil.rmtree(tmp_path / DATASET / "cfcl_generators")
    make(nnUNetTrainerDVDCL, **chosen).run_training()
    assert "is reused" in capsys.readouterr().out
    assert not store.exists() and not (tmp_path / DATASET / "cfcl_generators").exists()


def test_an_intervention_that_fails_the_gate_has_acquisition_in_its_place(x_rays, trainers_of, capsys):
    make = trainers_of(x_rays, DATASET, "2d")
    make(nnUNetTrainerDVDCL, counterfactual=ALONE, generator={**GENERATOR, "validation_share": 0.45},
         gate={**GATE, "predictor_steps": 60, "predictability": 0.0}).run_training()
    output = capsys.readouterr().out
    assert "the generator is fine-tuned against an attribute predictor" in output
    assert "Gate, intervention 'scanner': not passed" in output
    assert "No intervention of the generator passed the gate: acquisition effects replace it" in output
    assert "counterfactuals: acquisition" in output


def test_without_a_store_the_generator_works_on_every_crop(x_rays, trainers_of, capsys):
    stores = _stores(x_rays)
    make = trainers_of(x_rays, DATASET, "2d")
    make(nnUNetTrainerMVDCL, **{**TRUSTED, "counterfactual": {**ALONE, "store": False}}).run_training()
    assert "counterfactuals: generator" in capsys.readouterr().out
    assert _stores(x_rays) == stores


def _rewrite(file: Path, change) -> None:
    with open(file, newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows = change(rows)
    with open(file, "w", newline="") as handle:
        table = csv.DictWriter(handle, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _unknown_cases(rows):
    return [{**row, "case": f"somebody_{number}"} for number, row in enumerate(rows)]


def _one_value(rows):
    return [{**row, "scanner": "one"} for row in rows]


def _half_missing(rows):
    return [{**row, "scanner": row["scanner"] if number % 3 == 0 else ""} for number, row in enumerate(rows)]


def _continuous(rows):
    return [{**row, "scanner": str(number + 0.5)} for number, row in enumerate(rows)]


@pytest.mark.parametrize(("change", "said"), [
    (_unknown_cases, ["names none of the", "write the names of the cases"]),
    (_one_value, ["'scanner' is not an attribute with at least two values"]),
    (_half_missing, ["has no value of 'scanner' for", "fill in these rows"]),
    (_continuous, ["'scanner' is continuous; only binary and categorical attributes can be changed"]),
], ids=["unknown cases", "one value", "half missing", "continuous"])
def test_a_bad_table_of_attributes_is_refused_before_any_training(x_rays, run_here, change, said):
    file = _attributes(x_rays)
    good = file.read_text()
    try:
        _rewrite(file, change)
        x_rays.settings(**TRUSTED)
        output = run_here(x_rays, "nnunet_cfcl", "generator", "train", *COMMAND, status=1)
    finally:
        file.write_text(good)
    assert all(words in output for words in said), output
    assert output.count("nnunet_cfcl generator: ") == 1


def test_a_generator_of_another_plan_is_refused(x_rays, trainers_of, tmp_path):
    make = trainers_of(x_rays, DATASET, "2d")
    make(nnUNetTrainerDVDCL, **TRUSTED).run_training()
    (folder,) = (tmp_path / DATASET / "cfcl_generators").iterdir()
    kept = (folder / "generator.pth").read_bytes()

    def larger(configurations):
        configurations["2d"]["patch_size"] = [2 * n for n in configurations["2d"]["patch_size"]]

    trainer = make(nnUNetTrainerDVDCL, plan=larger, **{**TRUSTED, "generator": {**GENERATOR, "epochs": 1}})
    trainer.run_training()
    other = next(one for one in (tmp_path / DATASET / "cfcl_generators").iterdir() if one != folder)
    (other / "generator.pth").write_bytes(kept)
    (trainer.pretraining_folder / "checkpoint_final.pth").unlink()
    with pytest.raises(UserError, match="differs from this run in generator, sizes, plan"):
        make(nnUNetTrainerDVDCL, plan=larger, **{**TRUSTED, "generator": {**GENERATOR, "epochs": 1}}).run_training()
