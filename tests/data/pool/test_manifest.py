"""The pool as a training reads it: manifest, content, and the check that it is up to date."""

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.pool.manifest import (
    CaseRecord,
    Manifest,
    check_pool_is_current,
    manifest_file,
    pool_folder,
    read_manifest,
    silver_folder,
    write_manifest,
)
from nnunet_cfcl.data.pool.run import preprocess_pool
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.errors import UserError

DATASET = "Dataset007_Toy"
RECORD = CaseRecord((1, 1, 20, 28), True, 0.5, True, False, ("a.b2nd", "a_seg.b2nd", "a.pkl"), "f00", "abc")


@pytest.fixture
def raw(toy):
    folder = toy / "nnUNet_raw" / DATASET
    for name in ("imagesUn", "labelsSilver"):
        (folder / name).mkdir()
    random = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        io.imsave(folder / "imagesUn" / f"{case}_0000.png", random.integers(1, 255, (20, 28)).astype(np.uint8))
    for case in ("a", "b"):
        label = random.integers(0, 2, (20, 28)).astype(np.uint8)
        io.imsave(folder / "labelsSilver" / f"{case}.png", label, check_contrast=False)
    (folder / "labelsSilver" / "silver.csv").write_text("case,quality\na,0.5\n")
    return folder


@pytest.fixture
def check(toy):
    """`check_pool_is_current` as a training of the toy dataset calls it."""
    folder = toy / "nnUNet_preprocessed" / DATASET

    def run(configuration="2d"):
        description = json.loads((folder / "dataset.json").read_text())
        plans = PlansManager(str(folder / "nnUNetPlans.json"))
        check_pool_is_current(folder / "nnUNetPlans_2d", plans, configuration, description)

    return run


def make() -> None:
    preprocess_pool("7", "2d", log=lambda line: None)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = Manifest("d1", True, {"b": RECORD, "a": dataclasses.replace(RECORD, silver=False)})
    write_manifest(tmp_path / "x_cfcl_pool", manifest)
    assert read_manifest(tmp_path / "x_cfcl_pool") == manifest
    assert list(read_manifest(tmp_path / "x_cfcl_pool").cases) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["x_cfcl_pool.json"]


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"format": 2}', '{"format": 1, "preprocessing": "", "complete": true, "cases": {"a": {}}}'])
def test_a_broken_manifest_is_an_error_that_names_the_files_to_delete(tmp_path, text):
    folder = tmp_path / "x_cfcl_pool"
    manifest_file(folder).write_text(text)
    with pytest.raises(UserError, match="x_cfcl_pool.json is not a readable manifest .* run nnunet_cfcl pool again"):
        read_manifest(folder)


def test_cases_are_selected_by_the_quality_of_their_silver_label():
    cases = {"a": RECORD, "b": dataclasses.replace(RECORD, quality=1.0), "c": dataclasses.replace(RECORD, silver=False)}
    manifest = Manifest("d1", True, cases)
    assert manifest.with_silver() == manifest.with_silver(0.5) == ("a", "b")
    assert manifest.with_silver(0.51) == ("b",)


def test_the_content_depends_on_voxels_labels_and_qualities_of_the_chosen_cases_alone():
    def content(names=None, **changes):
        return Manifest("d1", True, {"a": dataclasses.replace(RECORD, **changes), "b": RECORD}).content(names)

    assert content() == content(sources="other", files=("a.b2nd",))
    assert len({content(), content(content="xyz"), content(silver=False), content(quality=0.4), content("a")}) == 5
    assert content("b") == content("b", content="xyz") == content(["b"])


def test_images_and_silver_labels_are_read_in_boxes_also_after_pickling(raw, toy_cases):
    make()
    folder = pool_folder(toy_cases)
    manifest = read_manifest(folder)
    images = PreprocessedCases(str(folder), manifest.cases)
    silver = pickle.loads(pickle.dumps(SilverLabels(toy_cases)))
    box = (slice(0, 1), slice(3, 9), slice(5, 25))
    assert images.read("c", box).shape == (1, 1, 6, 20)
    assert silver.cases == ("a", "b")
    labels, confidence = silver.read("a", box)
    np.testing.assert_array_equal(labels[0], io.imread(raw / "labelsSilver" / "a.png")[3:9, 5:25])
    assert confidence.shape == labels.shape and (confidence == 50).all()
    assert (silver.read("b", box)[1] == 100).all()
    assert SilverLabels(toy_cases, min_quality=0.6).cases == ("b",)


def test_without_a_pool_there_are_no_silver_labels(toy_cases):
    assert SilverLabels(toy_cases).cases == ()


def test_a_dataset_without_a_pool_and_one_that_is_up_to_date_pass(toy, raw, check):
    make()
    check()
    check("2d_small")
    shutil.rmtree(toy / "nnUNet_raw" / DATASET / "imagesUn")
    check()
    shutil.rmtree(toy / "nnUNet_raw")
    check()
    folder = toy / "nnUNet_preprocessed" / DATASET
    for path in folder.glob("*_cfcl_pool*"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    check()


def test_a_pool_that_was_never_preprocessed_is_an_error_with_the_command(raw, check):
    with pytest.raises(UserError, match=r"imagesUn has 3 cases that were never preprocessed.*labelsSilver has 2 cases.*"
                                        r"run nnunet_cfcl pool -d 7 -c 2d$"):
        check()


def test_new_and_removed_files_are_listed(raw, check):
    make()
    (raw / "imagesUn" / "a_0000.png").rename(raw / "imagesUn" / "new_0000.png")
    (raw / "labelsSilver" / "b.png").unlink()
    with pytest.raises(UserError, match=r"imagesUn changed since it was preprocessed: 1 new \(new\) and 1 removed "
                                        r"\(a\); .*labelsSilver changed .*: 1 removed \(b\); "
                                        "fix: run nnunet_cfcl pool"):
        check()


@pytest.mark.parametrize("edit", [
    lambda block: block.update(spacing=[2.0, 2.0]),
    lambda block: block.update(normalization_schemes=["RescaleTo01Normalization"]),
    lambda block: block["resampling_fn_seg_kwargs"].update(order=0)])
def test_a_changed_plan_is_an_error_with_the_command(raw, check, change_plan, edit):
    make()
    change_plan(lambda plan: edit(plan["configurations"]["2d"]))
    with pytest.raises(UserError, match="_cfcl_pool was preprocessed with another plan.*nnunet_cfcl pool -d 7 -c 2d"):
        check()


def test_a_larger_patch_or_another_network_needs_no_new_pool(raw, check, change_plan):
    make()
    change_plan(lambda plan: plan["configurations"]["2d"].update(patch_size=[8, 8], batch_size=1))
    check()


def test_other_labels_in_dataset_json_are_an_error(raw, toy, check):
    make()
    file = toy / "nnUNet_preprocessed" / DATASET / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "labels": {"background": 0, "lung": 1, "heart": 2}}))
    with pytest.raises(UserError, match=r"with other labels in dataset\.json"):
        check()


def test_an_interrupted_pool_and_lost_files_are_errors(raw, toy_cases, check):
    make()
    folder = pool_folder(toy_cases)
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, complete=False))
    with pytest.raises(UserError, match="is incomplete: preprocessing was interrupted after 3 cases"):
        check()
    write_manifest(folder, manifest)
    (folder / "b_seg.b2nd").unlink()
    with pytest.raises(UserError, match="lacks 1 files: b_seg.b2nd"):
        check()


def test_the_folders_lie_beside_the_preprocessed_cases(tmp_path):
    base = tmp_path / "nnUNetPlans_3d_fullres"
    assert pool_folder(base) == tmp_path / "nnUNetPlans_3d_fullres_cfcl_pool"
    assert silver_folder(str(base)) == tmp_path / "nnUNetPlans_3d_fullres_cfcl_silver"
    assert manifest_file(pool_folder(base)) == tmp_path / "nnUNetPlans_3d_fullres_cfcl_pool.json"
