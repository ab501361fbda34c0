"""Phase 1 with phase 0 in front of it: mistakes are found before a generator is trained, and one that nobody needs is
not made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_cfcl.counterfactual.source import OriginalSource
from nnunet_cfcl.data.pool.manifest import CaseRecord, Manifest, pool_folder, pool_preprocessing, write_manifest
from nnunet_cfcl.errors import NotSupported, UserError
from nnunet_cfcl.phases.generator_phase import GeneratorPhase
from nnunet_cfcl.phases.pretraining_phase import PretrainingPhase
from nnunet_cfcl.runs.checkpoint import save_checkpoint
from nnunet_cfcl.runs.ranks import Ranks
from tests.toy_dataset import CASES

SHAPE = (1, 1, 24, 24)


@pytest.fixture
def begun(monkeypatch):
    """Phase 0 does nothing but note that it was begun."""
    times = []

    def source(phase):
        times.append(phase)
        return OriginalSource()

    monkeypatch.setattr(GeneratorPhase, "source", source)
    monkeypatch.setattr(GeneratorPhase, "copy_report", lambda phase, folder: None)
    return times


def pretrain(fold, continues=None) -> Path:
    return PretrainingPhase(fold, fold.trainer_class.method, continues, Ranks()).run(fold.build_network())


def test_a_finished_phase_1_is_reused_and_phase_0_not_begun(make_fold, lines, begun):
    folder = pretrain(make_fold())
    assert len(begun) == 1 and (folder / "checkpoint_final.pth").exists()
    again = make_fold()
    assert pretrain(again) == folder and len(begun) == 1
    assert any("is reused" in line for line in lines)


def test_a_checkpoint_of_something_else_is_refused_by_name(make_fold, begun):
    folder = pretrain(make_fold())
    for name in ("checkpoint_final.pth", "checkpoint_latest.pth"):
        for file in folder.glob("*.pth"):
            file.unlink()
        save_checkpoint({"network_weights": {}, "epoch": 3}, folder / name)
        for continues in (None, True):
            with pytest.raises(UserError, match=f"{name} is not a checkpoint of phase 1, it lacks hash, identity; fix"):
                pretrain(make_fold(), continues)
    assert len(begun) == 1


def test_other_limits_of_the_gate_ask_for_another_phase_1(make_fold, begun, change_settings):
    pretrain(make_fold())
    change_settings(gate={"reversibility": 0.8})
    pretrain(make_fold())
    assert len(begun) == 2


def test_the_cases_are_said_once(make_fold, lines, begun):
    pretrain(make_fold())
    assert sum(line.startswith("phase 1 has 6 training cases") for line in lines) == 1
    # labels, which this method does not use, are the gate's alone
    assert not any("labels" in line for line in lines)


@pytest.mark.parametrize(("section", "named"), [
    ({"pretrain": {"temperature": 0.5}}, "pretrain.temperature: 0.1 then, 0.5 now"),
    ({"generator": {"beta": 2.0}}, "counterfactuals.generator"),
    ({"gate": {"reversibility": 0.8}}, "counterfactuals.gate.reversibility: 0.5 then, 0.8 now")])
def test_a_run_of_other_settings_is_not_continued_and_phase_0_not_begun(
        make_fold, begun, change_settings, section, named):
    pretrain(make_fold())
    change_settings(**section)
    with pytest.raises(UserError, match=named):
        pretrain(make_fold(), continues=True)
    assert len(begun) == 1


def test_a_network_that_cannot_be_pretrained_is_refused_before_phase_0(
        make_fold, begun, change_settings, change_plan):
    change_plan(lambda plan: plan["configurations"]["2d"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm2d"))
    change_settings(pretrain={"images_per_step": 4})
    with pytest.raises(NotSupported, match="BatchNorm2d"):
        pretrain(make_fold())
    assert not begun


def test_a_device_that_pretraining_does_not_run_on_is_refused_before_phase_0(make_fold, begun):
    fold = replace(make_fold(), device=torch.device("meta"))
    with pytest.raises(NotSupported, match="own phases run with -device cuda or cpu, found meta"):
        pretrain(fold)
    assert not begun


def test_labels_that_the_pool_lacks_are_missed_before_phase_0(make_fold, begun, change_settings, write_attributes):
    fold = make_fold("nnUNetTrainerSDVDCL")
    pool = [f"un_{number}" for number in range(6)]
    folder = pool_folder(fold.preprocessed)
    folder.mkdir()
    records = {}
    for number, case in enumerate(pool):
        image = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)
        nothing = np.full((2, *SHAPE[1:]), -1, np.int16)
        nnUNetDatasetBlosc2.save_case(image, nothing, {}, str(folder / case), chunks=SHAPE, blocks=SHAPE)
        files = tuple(sorted(path.name for path in folder.glob(f"{case}[._]*")))
        records[case] = CaseRecord(SHAPE, False, 1.0, False, False, files, "", f"{number}")
    preprocessing = pool_preprocessing(
        fold.plans, fold.configuration, fold.dataset_json)
    write_manifest(folder, Manifest(preprocessing, True, records))
    write_attributes([*CASES, *pool])
    change_settings(pretrain={"data": "pool"})
    with pytest.raises(UserError, match="none of the 6 cases of the pool has a silver label"):
        pretrain(make_fold("nnUNetTrainerSDVDCL"))
    assert not begun
