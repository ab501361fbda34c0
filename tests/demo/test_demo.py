"""The demo: its data, recipes and picture, and the whole chain with a few steps."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.demo import run_demo
from nnunet_cfcl.demo.data import PHANTOM, choose_held_out, write_phantom
from nnunet_cfcl.demo.picture import draw_demo, explanation, headline
from nnunet_cfcl.demo.recipe import PLUGIN, STOCK, DemoSize, plugin, stock, volumes
from nnunet_cfcl.demo.results import Results, Shown, read_dice
from nnunet_cfcl.errors import UserError

TINY = DemoSize(labelled=4, pool=4, test=2, image=32, stages=3, features=4, batch=2, epochs=1, later=1, iterations=2,
                volume=(16, 24, 24), volume_steps=1)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_phantom_has_labels_of_scanner_a_alone_and_shows_test_patients_on_both(tmp_path):
    folder = write_phantom(tmp_path, TINY)
    with open(folder / "attributes.csv", newline="") as file:
        scanners = {row["case"]: row["scanner"] for row in csv.DictReader(file)}
    assert [len(names(folder / name)) for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs")] == [4, 4, 4, 4]
    labelled = [name.removesuffix(".png") for name in names(folder / "labelsTr")]
    assert {scanners[case] for case in labelled} == {"A"}
    pool = [name.removesuffix("_0000.png") for name in names(folder / "imagesUn")]
    assert sorted(scanners[case] for case in pool) == ["A", "A", "B", "B"] and not set(pool) & set(labelled)
    assert names(folder / "counterfactuals") == sorted(f"{case}__scanner_0000.png" for case in labelled + pool)
    first = [np.asarray(Image.open(folder / "labelsTs" / f"phantom_100000_{scanner}.png")) for scanner in "AB"]
    assert np.array_equal(*first)


def test_all_test_cases_are_grouped_by_scanner_that_of_the_labels_first(tmp_path):
    folder = write_phantom(tmp_path / "raw", TINY)
    held_out = choose_held_out(folder, tmp_path, tmp_path, None)
    assert list(held_out.groups) == ["A", "B"] and held_out.labelled == "A" and held_out.fold == "all"
    assert len(names(held_out.images)) == len(names(held_out.labels)) == 4


def test_without_labelled_test_cases_and_attributes_the_validation_cases_are_one_group(tmp_path):
    folder = write_phantom(tmp_path / "raw", DemoSize(labelled=10, pool=2, test=1, image=32))
    (folder / "attributes.csv").unlink()
    (folder / "labelsTs" / "phantom_100000_A.png").unlink()
    held_out = choose_held_out(folder, tmp_path, tmp_path, 1)
    split = json.loads((tmp_path / "splits_final.json").read_text())[0]
    assert (list(held_out.groups), held_out.labelled, held_out.fold) == ([""], "", "0")
    assert list(held_out.groups[""]) == split["val"][:1] and len(split["val"]) == 2


@pytest.mark.parametrize(("pool", "true"), [(True, True), (True, False), (False, False)])
def test_both_models_have_as_many_optimiser_steps(pool, true):
    size = DemoSize()
    alone, ours = (resolve_settings(recipe.settings) for recipe in (stock(size), plugin(size, pool, true)))
    steps = alone.finetune.epochs * alone.finetune.iterations_per_epoch
    later = (ours.teacher.epochs * ours.finetune.iterations_per_epoch if pool else
             ours.pretrain.epochs * ours.pretrain.iterations_per_epoch)
    assert steps == size.steps == ours.finetune.epochs * ours.finetune.iterations_per_epoch + later
    assert ours.counterfactual.source == ("precomputed" if true else "acquisition")


def results(groups=("A", "B"), own=False):
    image = np.arange(64.0).reshape(8, 8)
    mask = (image > 32).astype(np.uint8)
    shown = [Shown(group, image, mask, {STOCK: mask, PLUGIN: mask}, None, {STOCK: 0.5, PLUGIN: 0.9})
             for group in groups]
    dice = {STOCK: dict(zip(groups, (0.98, 0.55))), PLUGIN: dict(zip(groups, (0.97, 0.95)))}
    return Results(PHANTOM, own, (stock(TINY), plugin(TINY, True, not own)), {STOCK: 61.0, PLUGIN: 150.0, "3d": 9.0},
                   {1: "lung"}, 12, 40, groups[0], dice, dict.fromkeys(groups, 10), shown, volumes(TINY))


@pytest.mark.parametrize("groups", [("A", "B"), ("",)])
def test_the_picture_is_drawn_with_one_group_too(tmp_path, groups):
    draw_demo(results(groups, own=len(groups) == 1), tmp_path / "demo.png")
    assert Image.open(tmp_path / "demo.png").size == (1600, 860)


def test_the_headline_has_the_dice_on_the_scanner_without_labels():
    assert headline(results()) == (
        "Scanner B, which has no labels: Dice 0.55 with nnU-Net alone, 0.95 with nnunet_cfcl")
    assert headline(results(("",), own=True)).startswith(f"{PHANTOM}: Dice 0.98 with nnU-Net alone")


def test_the_text_says_which_counterfactuals_were_used_and_how_long_each_training_took():
    text = " ".join(explanation(results()).split())
    assert "are the true ones, which only a phantom has" in text and "1:01 min" in text and "2:30 min" in text
    assert "true ones" not in explanation(results(own=True)) and "acquisition effects" in explanation(results(own=True))


def test_a_folder_of_other_content_and_a_raw_folder_that_is_none_are_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="has content that is not of a demo"):
        run_demo(tmp_path, None, "cpu", TINY)
    with pytest.raises(UserError, match="is not a raw dataset of nnU-Net"):
        run_demo(tmp_path / "new", tmp_path, "cpu", TINY)
    assert not (tmp_path / "new").exists()


@pytest.mark.end_to_end
def test_the_whole_chain_runs_with_a_few_steps(tmp_path, capsys):
    picture = run_demo(tmp_path / "demo", None, "cpu", TINY)
    assert Image.open(picture).size == (1600, 860)
    evaluated = picture.parent / "evaluation"
    assert read_dice(evaluated / "metrics.csv").keys() == read_dice(evaluated / f"metrics_{PLUGIN}.csv").keys()
    assert len(list((picture.parent / "predictions" / PLUGIN / "chromap").glob("phantom_*.png"))) == 4
    shown = capsys.readouterr().out
    assert "[plugin] Phase 3 epoch 0" in shown and "[3d] Epoch 0" in shown and "scanner B, plugin: Dice" in shown
