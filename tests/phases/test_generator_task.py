"""From an nnU-Net trainer to the generator's task: cases, patients, plan, identity, folder."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange
from nnunet_cfcl.phases.generator_task import build_generator_task, has_attributes, pooling_strides
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.trainers.lookup import find_trainer
from tests.toy_dataset import plan

DATASET = "Dataset007_Toy"
ROWS = {"toy_0": ("A", "p0", "40"), "toy_1": ("B", "p1", "50"), "toy_2": ("A", "p2", "61"), "toy_3": ("B", "p3", "62"),
        "toy_4": ("A", "p4", "63"), "toy_5": ("B", "p5", "64.5")}
SHORT = {"generator": {"epochs": 1, "iterations_per_epoch": 1, "images_per_step": 2, "width": 4, "blocks": 1},
         "counterfactual": {"interventions": ["scanner"]}, "gate": {"enabled": False}}


@pytest.fixture(autouse=True)
def settings(settings_file):
    """Short ones, in a file; a function that changes a section."""
    return settings_file(SHORT)


@pytest.fixture
def write(toy):
    """A function that writes the table of attributes."""

    def rows(rows=ROWS):
        text = "".join(f"{case},{','.join(cells)}\n" for case, cells in rows.items())
        (toy / "nnUNet_raw" / DATASET / "attributes.csv").write_text("case,scanner,patient,age\n" + text)

    return rows


def fold_of(fold="all", configuration="2d", name="nnUNetTrainerDVDCL", log=None):
    lines = [] if log is None else log
    return FoldContext.find(find_trainer(name), "7", configuration, fold, "nnUNetPlans", torch.device("cpu"),
                            lambda *line, **ignored: lines.append(" ".join(map(str, line))))


def task_of(**how):
    return build_generator_task(fold_of(**how), Ranks())


def test_there_are_attributes_where_there_is_a_table_with_a_column_of_them(toy, write):
    assert not has_attributes(fold_of())
    (toy / "nnUNet_raw" / DATASET / "attributes.csv").write_text("case,patient\ntoy_0,p0\n")
    assert not has_attributes(fold_of())
    write()
    assert has_attributes(fold_of())


def test_the_task_is_that_of_the_fold_and_the_plan(toy, write):
    write()
    task = task_of(fold="0")
    expected, held_out = fold_of(fold="0").split()
    assert sorted([*task.training, *task.validation]) == sorted(expected) and task.validation
    assert not {*task.training, *task.validation} & set(held_out)
    assert [one.shape for one in task.sizes.resolutions] == [(16, 16), (8, 8), (4, 4), (1, 1)]
    assert task.sizes.channels == 1 and task.sizes.parents == task.coding.width
    assert [one.name for one in task.coding.attributes] == ["scanner", "age"]
    assert [one.name for one in task.interventions] == ["scanner"] == [one.name for one in task.changed]
    assert task.cells[task.training[0]]["scanner"] == ROWS[task.training[0]][0]
    assert task.spacing == (1.0, 1.0) and task.images_per_pass == 2 and task.workers == 0
    assert task.folder == toy / "nnUNet_results" / DATASET / "cfcl_generators" / digest(task.identity)
    json.dumps(task.identity)


def test_the_cases_are_said_unless_another_says_so(write):
    write()
    for tells, count in ((True, 1), (False, 0)):
        lines: list[str] = []
        build_generator_task(fold_of(log=lines), Ranks(), tells)
        assert sum(line.startswith("phase 1 has 6 training cases") for line in lines) == count


def test_the_task_can_be_trained(write):
    write()
    task = task_of()
    GeneratorTraining(task).run(resume=False)
    assert (task.folder / "generator.pth").exists()


def test_patients_are_not_divided(write):
    write({case: (scanner, f"p{int(case[-1]) // 2}", age) for case, (scanner, _, age) in ROWS.items()})
    task = task_of()
    assert len(task.validation) == 2 and len({int(case[-1]) // 2 for case in task.validation}) == 1


def test_the_scale_is_that_of_the_training_cases(write, save_case):
    write()
    task = task_of()
    for case in task.validation:
        save_case(case, np.full((1, 1, 24, 24), 1e6))
    again = task_of()
    assert again.validation == task.validation and torch.equal(again.scale.mean, task.scale.mean)


def test_the_identity_knows_settings_cases_attributes_and_plan(write, settings, save_case, change_plan):
    write()
    found = {digest(task_of().identity)}
    assert digest(task_of().identity) in found
    for changed in ({"beta": 2.0}, {"width": 8}, {"validation_share": 0.5}):
        settings(generator=changed)
        found.add(digest(task_of().identity))
    settings()
    found.add(digest(task_of(fold="0").identity))
    write({**ROWS, "toy_5": ("A", "p5", "64.5")})
    found.add(digest(task_of().identity))
    write()
    save_case("toy_0", np.random.default_rng(9).normal(size=(1, 1, 24, 24)))
    found.add(digest(task_of().identity))
    change_plan(lambda plan: plan["configurations"]["2d"].update(spacing=[2.0, 2.0]))
    found.add(digest(task_of().identity))
    assert len(found) == 8


@pytest.mark.parametrize("section", [
    {"generator": {"samples_every": 50}}, {"generator": {"finetune_epochs": 3, "finetune_lr": 1e-5}},
    {"generator": {"memory_gb": 2.0}}, {"gate": {"cases": 7}},
    {"pretrain": {"epochs": 3}}, {"counterfactual": {"count": 2}}, {"finetune": {"epochs": 3}}])
def test_what_does_not_change_the_generator_does_not_change_its_identity(write, settings, section):
    write()
    before = digest(task_of().identity)
    settings(**section)
    assert digest(task_of().identity) == before


def test_trainers_share_a_generator(write):
    write()
    assert digest(task_of(name="nnUNetTrainerMVDCL").identity) == digest(task_of().identity)


def test_the_identity_of_sizes_is_all_of_them(write):
    write()
    task = task_of()
    assert task.identity["sizes"] == asdict(task.sizes)


# ---------------------------------------------------------------- messages


def test_without_a_table_it_is_said_how_to_write_one():
    with pytest.raises(UserError, match=rf"no attributes\.csv in nnUNet_raw/{DATASET}.*discover -d {DATASET}"):
        task_of()


def test_without_two_patients_of_the_same_attributes_nobody_can_be_held_out(write):
    write({case: (cells[0], "p0", cells[2]) for case, cells in ROWS.items()})
    with pytest.raises(UserError, match=r"of the 6 cases only 0 can be held out"):
        task_of()


def test_a_patch_that_cannot_be_pooled_is_refused(write, settings):
    write()
    settings(generator={"patch_size": [18, 16]})
    with pytest.raises(UserError, match=r"divisible by \[4, 4\].*found \[18, 16\]; fix: set generator.patch_size"):
        task_of()


def configuration_with(strides):
    content = plan()
    content["configurations"]["2d"]["architecture"]["arch_kwargs"]["strides"] = strides
    return PlansManager(content).get_configuration("2d")


def test_a_network_without_strides_is_refused():
    with pytest.raises(UserError, match=r"PlainConvUNet has no strides.*counterfactual.source to acquisition"):
        pooling_strides(configuration_with(None))


def test_strides_may_be_numbers():
    assert pooling_strides(configuration_with([1, 2, [2, 1]])) == [(1, 1), (2, 2), (2, 1)]


def test_with_fewer_cases_than_the_gate_looks_at_nothing_is_trained(write, settings):
    write()
    settings(gate={"enabled": True})
    with pytest.raises(NothingToChange, match=r"at least 8 held-out cases.*of the 6 cases only 2 can be held out"):
        task_of()


def test_the_generator_can_be_trained_where_only_the_fine_tuning_uses_it(write, settings):
    write()
    settings(pretrain={"enabled": False}, finetune={"counterfactual_probability": 0.5})
    assert task_of().training
