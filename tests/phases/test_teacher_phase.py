"""Phase 3 of a fold: length, groups, classes, identity, checks before the first phase; two ranks with a generator."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.mixed import MixedSource
from nnunet_cfcl.data.pool.manifest import CaseRecord, Manifest, pool_folder, pool_preprocessing, write_manifest
from nnunet_cfcl.errors import NotSupported, UserError
from nnunet_cfcl.losses import pseudo_label_loss
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.live_training import LiveTraining
from nnunet_cfcl.phases import teacher_phase, teacher_task
from nnunet_cfcl.phases.teacher_phase import END_OF_PHASE_2, TeacherPhase
from nnunet_cfcl.runs.checkpoint import save_checkpoint
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.trainers.lookup import find_trainer
from tests.runs.crew import Crew
from tests.toy_dataset import CASES, DATASET

POOL = [f"new_{number}" for number in range(4)]


@pytest.fixture
def pool(toy, make_fold):
    """A preprocessed pool of four images, three of scanner B."""
    fold = make_fold()
    folder = pool_folder(fold.preprocessed)
    folder.mkdir()
    random, records = np.random.default_rng(7), {}
    for case in POOL:
        image, labels = random.normal(size=(1, 1, 24, 24)).astype(np.float32), np.full((2, 1, 24, 24), -1, np.int16)
        nnUNetDatasetBlosc2.save_case(image, labels, {}, str(folder / case), chunks=(1, 1, 24, 24),
                                      blocks=(1, 1, 24, 24), chunks_seg=(2, 1, 24, 24), blocks_seg=(2, 1, 24, 24))
        files = tuple(sorted(path.name for path in folder.glob(f"{case}[._]*")))
        records[case] = CaseRecord((1, 1, 24, 24), False, 1.0, False, False, files, "", case)
    write_manifest(folder, Manifest(pool_preprocessing(fold.plans, fold.configuration, fold.dataset_json), True,
                                    records))
    (toy / "nnUNet_raw" / DATASET / "imagesUn").mkdir()
    rows = [f"{case},{'AB'[n % 2]},p{n}" for n, case in enumerate(CASES)]
    rows += [f"{case},{'A' if n == 0 else 'B'},q{n}" for n, case in enumerate(POOL)]
    (toy / "nnUNet_raw" / DATASET / "attributes.csv").write_text("case,scanner,patient\n" + "\n".join(rows) + "\n")
    return toy


@pytest.fixture(autouse=True)
def no_raw_check(monkeypatch):
    """The toy pool has no raw images."""
    monkeypatch.setattr("nnunet_cfcl.data.pretraining_cases.check_pool_is_current", lambda *_: None)


def fold_of(**sections) -> FoldContext:
    found = FoldContext.find(find_trainer("nnUNetTrainerDVDCL"), DATASET, "2d", "all", "nnUNetPlans",
                             torch.device("cpu"), lambda *line, **ignored: None)
    settings = found.settings
    for name, changes in sections.items():
        settings = replace(settings, **{name: replace(getattr(settings, name), **changes)})
    return replace(found, settings=settings, split=lambda: (CASES[:4], CASES[4:]), fold=0)


ACQUISITION = {"counterfactual": {"source": "acquisition"}}


@pytest.mark.parametrize(
    ("settings", "weak_views", "epochs"),
    [({}, 1, 107), ({}, 2, 94), ({"teacher.budget": 0.0}, 1, 1), ({"teacher.weight": 0.0}, 1, 250)])
def test_the_length_follows_from_the_budget(settings, weak_views, epochs):
    assert teacher_task.epochs_by_budget(resolve_settings(settings), 1000, weak_views) == epochs


def test_the_pool_is_divided_by_scanner_and_the_labelled_one_is_known(pool):
    fold = fold_of(**ACQUISITION)
    groups, labelled = teacher_task.pool_groups(fold, teacher_task.pool_cases(fold))
    assert groups == {"A": ("new_0",), "B": ("new_1", "new_2", "new_3")} and labelled in ("A", "B")


def test_images_without_a_value_are_no_scanner_of_their_own(pool):
    table = pool / "nnUNet_raw" / DATASET / "attributes.csv"
    table.write_text(table.read_text().replace("new_0,A,", "new_0,,"))
    fold = fold_of(**ACQUISITION)
    assert teacher_task.pool_groups(fold, teacher_task.pool_cases(fold))[0] == {"B": tuple(POOL)}


@pytest.mark.parametrize("balance", [None, "site"])
def test_without_the_attribute_all_images_are_drawn_alike(pool, balance):
    fold = fold_of(teacher={"balance": balance}, **ACQUISITION)
    assert teacher_task.pool_groups(fold, teacher_task.pool_cases(fold)) == ({"pool": tuple(POOL)}, None)


def test_images_of_validation_patients_never_enter(pool):
    table = pool / "nnUNet_raw" / DATASET / "attributes.csv"
    table.write_text(table.read_text().replace("q2", "p5"))  # toy_5 is a validation case
    reader = teacher_task.pool_cases(fold_of(**ACQUISITION))
    assert reader.pool == ("new_0", "new_1", "new_3") and not set(CASES[4:]) & set(reader.cases)


def test_a_pretraining_on_the_pool_alone_leaves_out_all_labelled_patients(pool):
    table = pool / "nnUNet_raw" / DATASET / "attributes.csv"
    table.write_text(table.read_text().replace("q1", "p0"))  # toy_0 is a training case
    assert "new_1" in teacher_task.pool_cases(fold_of(**ACQUISITION)).pool
    assert "new_1" not in teacher_task.pool_cases(fold_of(pretrain={"data": "pool"}, **ACQUISITION)).pool


def test_heads_have_the_names_of_the_classes(pool):
    assert teacher_task.head_names(fold_of()) == ["background", "organ"]


def test_manual_shares_are_those_of_random_patches(pool):
    fold = fold_of(**ACQUISITION)
    assert teacher_task.manual_shares(fold, teacher_task.pool_cases(fold), 2).tolist() == [1, 0]  # the toy's labels


def test_the_identity_changes_with_everything_that_decides(pool):
    def identity(start="start", **sections):
        fold = fold_of(**{**ACQUISITION, **sections})
        reader = teacher_task.pool_cases(fold)
        return teacher_task.teacher_identity(
            fold, training(fold, toy_network(fold)), reader, teacher_task.planned_source(fold, Ranks(), reader), start)

    same = identity()
    assert identity() == same and identity(teacher={"patches_per_pass": 1, "enabled": True}) == same
    for other in ({"start": "other"}, {"teacher": {"confidence": 0.8}}, {"finetune": {"acquisition_probability": 0.5}},
                  {"views": {"rotation_deg": 1.0}}, {"acquisition": {"probability": 0.1}}):
        assert identity(**other) != same, other


def test_a_device_that_the_phase_does_not_run_on_is_refused_at_the_start(pool):
    with pytest.raises(NotSupported, match="-device cuda or cpu, found meta"):
        TeacherPhase.planned(replace(fold_of(**ACQUISITION), device=torch.device("meta")), Ranks())


def test_missing_counterfactuals_are_an_error_at_the_start(pool):
    with pytest.raises(UserError, match="counterfactual.source is 'precomputed' but .* holds no store"):
        TeacherPhase.planned(fold_of(counterfactual={"source": "precomputed"}), Ranks())


def test_weights_to_start_from_demand_a_pool(toy, make_fold):
    make_fold()
    with pytest.raises(UserError, match="teacher.start_from is set, but phase 3 learns from a pool"):
        TeacherPhase.planned(fold_of(teacher={"start_from": "weights.pth"}, **ACQUISITION), Ranks())


# ---------------------------------------------------------------- a whole phase


def toy_network(fold: FoldContext) -> torch.nn.Module:
    torch.manual_seed(0)
    return fold.build_network()


def supervised(outputs, target) -> torch.Tensor:
    return pseudo_label_loss(outputs[0], target[0], torch.ones_like(target[0], dtype=torch.bool))


def training(fold: FoldContext, network: torch.nn.Module) -> LiveTraining:
    """A live training on two constant images."""
    target = [torch.zeros(2, 1, 16, 16, dtype=torch.int16)]
    target[0][..., 4:9, 4:9] = 1
    return LiveTraining(
        network=network, plain=network, batches=repeat({"data": target[0].float(), "target": target}), loss=supervised,
        output_weights=(1.0, 0.0), optimizer=lambda: torch.optim.SGD(network.parameters(), 0.01),
        pseudo_dice=lambda network: 0.5, epochs_before=0, epochs=4, iterations=2, batch_size=4)


def run_phase(ranks: Ranks, environment: dict[str, str], sections: dict) -> tuple[list[torch.Tensor], list[str]]:
    """Phase 3 on this rank, its generator trained on the spot; the resulting weights and the main rank's lines."""
    os.environ.update(environment)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_cfcl.data.pretraining_cases.check_pool_is_current", lambda *_: None)
        fold = replace(fold_of(**sections), log=lambda *line, **ignored: lines.append(" ".join(map(str, line))))
        network = toy_network(fold)
        phase = TeacherPhase.planned(fold, ranks)
        assert phase is not None
        if ranks.is_main:
            fold.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint({"network_weights": network.state_dict()}, fold.folder / END_OF_PHASE_2)
        ranks.wait()
        phase.run(training(fold, network))
    return list(network.state_dict().values()), lines


def environment(toy: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("nnUNet")}


GENERATOR = {"teacher": {"epochs": 1}, "gate": {"enabled": False}}


def test_two_ranks_train_a_generator_and_learn_from_its_counterfactuals(pool, tmp_path):
    crew = Crew(2, tmp_path)
    try:
        (weights, lines), (other, _) = crew(run_phase, environment(pool), GENERATOR)
        assert all(torch.equal(one, two) for one, two in zip(weights, other, strict=True))
        assert any("the student learns from counterfactuals: generator and acquisition" in line for line in lines)
        again = crew(run_phase, environment(pool), GENERATOR)
    finally:
        crew.close()
    assert any("Phase 3 was finished before" in line for line in again[0][1])
    assert all(torch.equal(one, two) for one, two in zip(weights, again[1][0], strict=True))


def test_a_generator_s_counterfactuals_on_the_labelled_scanner_are_shown_to_the_teacher(pool):
    fold = fold_of(**GENERATOR)
    reader = teacher_task.pool_cases(fold)
    planned = teacher_task.planned_source(fold, Ranks(), reader)
    planned.materialise()
    source, weak = teacher_task.student_source(fold, reader, planned, "A")
    assert isinstance(source, MixedSource) and source.name == "generator and acquisition"
    # images of scanner B, in the pool and among the labelled ones
    assert len(weak) == [*"ABAB", *"ABBB"].count("B")


def test_a_generator_that_is_not_needed_is_not_trained(pool, monkeypatch):
    monkeypatch.setattr(teacher_phase, "build_teacher_task", lambda *_: pytest.fail("built a task"))
    fold = fold_of(**GENERATOR)
    network = toy_network(fold)
    phase = TeacherPhase.planned(fold, Ranks())
    monkeypatch.setattr(TeacherPhase, "_start", lambda self, network: "start")
    monkeypatch.setattr(TeacherPhase, "_finished", lambda self, identity: network.state_dict())
    monkeypatch.setattr(type(phase.source), "materialise", lambda self: pytest.fail("trained a generator"))
    phase.run(training(fold, network))
