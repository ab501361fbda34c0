"""Phase 0: what is known before it is done, and what is done once."""

import json
from types import SimpleNamespace

import pytest

from nnunet_cfcl.counterfactual.generator.finetuning import finetuned_identity
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.phases import generator_phase as phase_0
from nnunet_cfcl.phases.generator_phase import GeneratorPhase
from nnunet_cfcl.runs.ranks import Ranks
from tests.faults.test_full_disk import no_file_longer_than


@pytest.fixture
def ineffective(monkeypatch):
    """A gate that lets nothing pass; the benches that it was given, and how many were set up."""
    seen = SimpleNamespace(judged=[], set_up=0)
    set_up = phase_0.train_judges

    def counted(*arguments):
        seen.set_up += 1
        return set_up(*arguments)

    def judge(bench, interventions, settings):
        seen.judged.append(bench)
        verdict = SimpleNamespace(passed=False, ineffective=True, summary="does nothing")
        return SimpleNamespace(interventions=interventions, verdicts=[verdict for _ in interventions])

    monkeypatch.setattr(phase_0, "train_judges", counted)
    monkeypatch.setattr(phase_0, "evaluate", judge)
    monkeypatch.setattr(phase_0, "write_report", lambda folder, *others: folder.mkdir())
    return seen


def test_both_generators_have_the_same_judges_which_are_trained_once(make_fold, ineffective):
    phase = GeneratorPhase(make_fold(), Ranks())
    judged = phase.judged()
    first, second = ineffective.judged
    assert ineffective.set_up == 1 and first.predictor is second.predictor and first.segmenter is second.segmenter
    assert digest(first.generator.identity) == digest(phase.task.identity)
    assert digest(second.generator.identity) == digest(finetuned_identity(phase.task))
    assert judged.generator is second.generator


def test_verdicts_that_are_written_down_need_no_judges(make_fold, ineffective):
    GeneratorPhase(make_fold(), Ranks()).judged()
    again = GeneratorPhase(make_fold(), Ranks())
    again.judged()
    assert ineffective.set_up == 1 and len(ineffective.judged) == 2 and again.report_folder.is_dir()


def test_verdicts_of_other_metrics_are_not_reused(make_fold, ineffective, monkeypatch):
    phase = GeneratorPhase(make_fold(), Ranks())
    phase.judged()
    before = phase.identity()
    monkeypatch.setattr(phase_0, "GATE_VERSION", phase_0.GATE_VERSION + 1)
    again = GeneratorPhase(make_fold(), Ranks())
    assert not again.is_judged() and again.identity() != before
    again.judged()
    assert len(ineffective.judged) == 4 and ineffective.set_up == 2 and again.report_folder != phase.report_folder


def test_a_generator_counts_as_judged_where_the_verdicts_are_on_itself_with_these_limits(
        make_fold, ineffective, change_settings):
    phase = GeneratorPhase(make_fold(), Ranks())
    assert not phase.is_judged()
    phase.trained()
    (phase.task.folder / "gate_of_others.json").write_text("{}")
    assert not phase.is_judged()
    phase.judged()
    assert phase.is_judged()
    phase.report_folder.rename(phase.task.folder / "moved")
    assert not phase.is_judged()
    (phase.task.folder / "moved").rename(phase.report_folder)
    change_settings(gate={"reversibility": 0.8})
    assert not GeneratorPhase(make_fold(), Ranks()).is_judged()
    change_settings()
    (phase.task.folder / "generator_finetuned.pth").unlink()
    assert not GeneratorPhase(make_fold(), Ranks()).is_judged()


def without(*keys):
    """Takes them out of an object in JSON."""
    return lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key not in keys})


def test_verdicts_that_are_damaged_are_refused_by_name_and_those_of_earlier_versions_read(
        make_fold, ineffective, change_settings):
    change_settings(generator={"finetune_epochs": 0})
    phase = GeneratorPhase(make_fold(), Ranks())
    phase.judged()
    file, = phase.task.folder.glob("gate_*.json")
    whole, unsealed = file.read_text(), without("checksum")(file.read_text())
    again = GeneratorPhase(make_fold(), Ranks())
    for text in (whole, unsealed):
        file.write_text(text)
        again.judged()
        assert again.report_folder == phase.report_folder
    assert whole != unsealed and ineffective.set_up == 1
    for text in (whole.replace("does nothing", "does_nothing"), whole.replace("scanner", "rcanner", 1),
                 unsealed.replace("scanner", "rcanner"), whole[: len(whole) // 2], "[]",
                 *(without("checksum", key)(whole) for key in ("passed", "ineffective", "words", "report"))):
        file.write_text(text)
        with pytest.raises(UserError, match=r"gate_\w+\.json cannot be read .*; fix: delete it and start again"):
            again.judged()


def test_a_report_that_cannot_be_copied_costs_a_word_and_leaves_no_half_file(make_fold, lines, tmp_path):
    fold = make_fold()
    phase, source, copy = GeneratorPhase(fold, Ranks()), tmp_path / "report", tmp_path / "copy"
    phase.report_folder = source
    phase.copy_report(copy)
    assert "No copy" in lines[-1] and str(copy) in lines[-1]
    source.mkdir()
    for name, size in (("report.json", 100), ("figures.png", 90_000)):
        (source / name).write_bytes(bytes(size))
    with no_file_longer_than(10_000):
        phase.copy_report(copy)
    assert [file.name for file in copy.iterdir()] == ["report.json"]
    assert "No copy" in lines[-1] and f"{copy / 'figures.png'}" in lines[-1]
    phase.copy_report(copy)
    assert {file.name: file.stat().st_size for file in copy.iterdir()} == {"report.json": 100, "figures.png": 90_000}


@pytest.fixture
def few_cases(monkeypatch):
    """Six cases are too few for the gate."""
    monkeypatch.setattr("nnunet_cfcl.phases.generator_task.FEWEST_CASES", 1)


def test_where_the_gate_lets_nothing_pass_acquisition_takes_its_place(
        make_fold, lines, ineffective, change_settings, few_cases):
    change_settings(gate={"enabled": True})
    fold = make_fold()
    assert GeneratorPhase(fold, Ranks()).source().name == "acquisition"
    assert any("No intervention of the generator passed the gate" in line for line in lines)


def identity_with(make_fold, change_settings, **sections):
    change_settings(**sections)
    phase = GeneratorPhase(make_fold(), Ranks())
    assert not phase.task.folder.exists()
    return phase.identity()


@pytest.mark.parametrize(("section", "key"), [
    ({"generator": {"beta": 2.0}}, "generator"), ({"generator": {"finetune_lr": 1e-5}}, "finetuning"),
    ({"gate": {"reversibility": 0.8}}, "gate"), ({"counterfactual": {"store": False}}, "stored"),
    ({"counterfactual": {"abduction": "sample"}}, "abduction")])
def test_what_decides_about_the_counterfactuals_is_known_before_anything_is_trained(
        make_fold, change_settings, section, key):
    before = identity_with(make_fold, change_settings)
    assert identity_with(make_fold, change_settings, pretrain={"temperature": 0.5}) == before
    after = identity_with(make_fold, change_settings, **section)
    assert {name for name in before if after[name] != before[name]} == {key}
    json.dumps(before)


def test_acquisition_is_named_where_the_gate_may_ask_for_it(make_fold, change_settings, few_cases):
    names = [identity_with(make_fold, change_settings, gate={"enabled": enabled})["source"]
             for enabled in (False, True)]
    assert names == ["generator", "generator or acquisition"]
