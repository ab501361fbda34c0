"""The store of precomputed counterfactuals: round trips, interrupted writes and readable errors."""

import json
import multiprocessing
import os
import pickle
import signal

import blosc2
import numpy as np
import pytest

from nnunet_cfcl.counterfactual import CounterfactualStore, default_store_root, find_store
from nnunet_cfcl.counterfactual.store import GENERATED, split_name
from nnunet_cfcl.errors import UserError

SHAPE = (2, 6, 20, 18)
CASES = {"case_1": SHAPE, "odd__case": (2, 5, 20, 18)}


def image(seed: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def store(tmp_path) -> CounterfactualStore:
    """A complete store of two cases and two interventions."""
    filled = CounterfactualStore.create(tmp_path / "store", ["vendorB", "low_field"], "test", "plans_3d", "abc")
    for index, (case, shape) in enumerate(CASES.items()):
        for offset, name in enumerate(filled.interventions):
            filled.write(case, name, image(2 * index + offset, shape), chunks=(1, 4, 16, 16), blocks=(1, 2, 8, 8))
    return filled


def test_written_counterfactuals_are_read_back_exactly(store):
    np.testing.assert_array_equal(store.read("case_1", "low_field"), image(1))
    np.testing.assert_array_equal(store.read("odd__case", "vendorB"), image(2, CASES["odd__case"]))


def test_a_box_equals_that_part_of_the_whole_image(store):
    box = (slice(1, 5), slice(3, 17), slice(0, 9))
    part = store.read("case_1", "vendorB", box)
    np.testing.assert_array_equal(part, image(0)[:, 1:5, 3:17, 0:9])
    assert part.dtype == np.float32


def test_files_have_the_given_chunks_and_blocks_and_the_shape_in_the_header(store):
    array = blosc2.open(str(store.path("case_1", "vendorB")), mode="r")
    assert array.chunks == (1, 4, 16, 16) and array.blocks == (1, 2, 8, 8)
    assert array.dtype == np.float32
    assert store.shape("case_1", "vendorB") == SHAPE


def test_other_number_types_are_saved_as_float32(store):
    store.write("case_1", "vendorB", np.arange(8, dtype=np.float64).reshape(1, 2, 2, 2))
    assert store.read("case_1", "vendorB").dtype == np.float32


def test_an_opened_store_has_the_attributes_of_its_manifest(store):
    opened = CounterfactualStore.open(store.folder)
    assert opened.interventions == ("vendorB", "low_field")
    assert (opened.source, opened.data_identifier, opened.preprocessing) == ("test", "plans_3d", "abc")


def test_a_store_can_be_pickled_into_a_spawned_worker(store):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        part = pool.apply(store.read, ("case_1", "vendorB", (slice(0, 2),)))
    np.testing.assert_array_equal(part, image(0)[:, :2])
    assert pickle.loads(pickle.dumps(store)).interventions == store.interventions


def test_a_complete_store_passes_the_check_also_with_files_of_further_known_cases(store):
    store.check(CASES)
    store.check({"case_1": SHAPE}, known=CASES)


def test_a_missing_file_is_named(store):
    store.path("odd__case", "low_field").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 4 files: odd__case__low_field\.b2nd"):
        store.check(CASES)
    with pytest.raises(UserError, match="of the pool too.*counterfactuals import.*pretrain.data to training.*"
                                        "counterfactual.source to acquisition"):
        store.check(CASES)
    with pytest.raises(UserError, match="'low_field' of case odd__case is missing"):
        store.read("odd__case", "low_field")


def test_of_many_missing_files_the_first_ten_are_named(store):
    with pytest.raises(UserError, match=r"lacks 16 of 16 files: c0__low_field(.*,){9}[^,]* and 6 more; "):
        CounterfactualStore.create(store.folder / "new", store.interventions, "x").check(
            {f"c{n}": SHAPE for n in range(8)})


def test_another_shape_is_an_error_with_both_shapes(store):
    store.write("case_1", "vendorB", image(0, (2, 6, 20, 17)))
    with pytest.raises(UserError, match=r"case_1__vendorB\.b2nd has shape \(2, 6, 20, 17\), expected \(2, 6, 20, 18\)"):
        store.check(CASES)


@pytest.mark.parametrize("foreign", ["nobody__vendorB", "case_1__vendorC", "case_1"])
def test_files_of_unknown_cases_and_interventions_are_named(store, foreign):
    os.link(store.path("case_1", "vendorB"), store.folder / "cases" / f"{foreign}.b2nd")
    with pytest.raises(UserError, match=rf"not in the dataset .* {foreign}\.b2nd"):
        store.check(CASES)


def test_a_damaged_file_is_named(store):
    store.path("case_1", "vendorB").write_bytes(b"not blosc2 at all")
    with pytest.raises(UserError, match=r"case_1__vendorB\.b2nd cannot be read, it is damaged"):
        store.check(CASES)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(store, monkeypatch):
    def dies(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_cfcl.counterfactual.store.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        store.write("case_1", "vendorB", image(9))
    np.testing.assert_array_equal(store.read("case_1", "vendorB"), image(0))
    assert not list((store.folder / "cases").glob("*.tmp"))


def _killed_before_renaming(store):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.write("case_1", "vendorB", image(9))


def test_a_killed_write_keeps_the_old_file_and_a_valid_store(store):
    process = multiprocessing.get_context("spawn").Process(target=_killed_before_renaming, args=(store,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((store.folder / "cases").glob("*.tmp"))
    store.check(CASES)
    np.testing.assert_array_equal(store.read("case_1", "vendorB"), image(0))
    store.write("case_1", "vendorB", image(9))
    np.testing.assert_array_equal(store.read("case_1", "vendorB"), image(9))


def test_only_interventions_of_the_store_and_four_axes_are_written(store):
    with pytest.raises(UserError, match="has the interventions vendorB, low_field, found 'vendorC'"):
        store.write("case_1", "vendorC", image(0))
    with pytest.raises(UserError, match=r"must be \(C, Z, Y, X\), found shape \(20, 18\)"):
        store.write("case_1", "vendorB", image(0)[0, 0])


@pytest.mark.parametrize("name", ["", "a__b", "a/b", "_a", "a_"])
def test_names_of_interventions_that_make_file_names_ambiguous_raise(tmp_path, name):
    with pytest.raises(UserError, match="must not contain"):
        CounterfactualStore.create(tmp_path, [name], "test")


def test_creating_a_store_again_keeps_its_files_and_adds_interventions(store):
    again = CounterfactualStore.create(store.folder, ["vendorC"], "test", "plans_3d", "abc")
    assert again.interventions == ("vendorB", "low_field", "vendorC")
    np.testing.assert_array_equal(again.read("case_1", "vendorB"), image(0))


def test_a_store_of_something_else_in_the_folder_is_not_overwritten(store):
    with pytest.raises(UserError, match="another preprocessing, found 'abc', expected 'xyz'"):
        CounterfactualStore.create(store.folder, ["vendorB"], "test", "plans_3d", "xyz")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"format": 2}', "expected format 1 of the counterfactual store, found 2"),
        ("[]", "expected format 1 of the counterfactual store"),
        ('{"format": 1, "source": "x", "interventions": []}', "must list the names"),
        ('{"format": 1, "source": "x", "interventions": ["a__b"]}', "must not contain '__'"),
        ('{"format": 1, "interventions": ["a"]}', "must name the 'source'"),
    ],
)
def test_an_invalid_manifest_raises_a_readable_error(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        CounterfactualStore.open(tmp_path)


def test_a_folder_without_manifest_is_no_store(tmp_path):
    with pytest.raises(UserError, match="is not a counterfactual store: cannot read"):
        CounterfactualStore.open(tmp_path)


def test_the_manifest_is_the_documented_json(store):
    assert json.loads((store.folder / "manifest.json").read_text()) == {
        "format": 1, "source": "test", "interventions": ["vendorB", "low_field"], "data_identifier": "plans_3d",
        "preprocessing": "abc"}


def test_the_only_store_beside_the_preprocessed_data_is_found(tmp_path):
    preprocessed = tmp_path / "Dataset001_X" / "nnUNetPlans_3d_fullres"
    assert default_store_root(preprocessed) == tmp_path / "Dataset001_X" / "nnUNetPlans_3d_fullres_cfcl_cf"
    assert find_store(preprocessed) is None
    first = CounterfactualStore.create(default_store_root(preprocessed) / "aaa", ["vendorB"], "test")
    assert find_store(preprocessed) == first.folder
    CounterfactualStore.create(default_store_root(preprocessed) / "bbb", ["vendorB"], "test")
    with pytest.raises(UserError, match=r"found 2 counterfactual stores, expected one.*counterfactual\.store"):
        find_store(preprocessed)


def test_generated_stores_are_not_mistaken_for_imported_ones(tmp_path):
    preprocessed = tmp_path / "Dataset001_X" / "nnUNetPlans_2d"
    root = default_store_root(preprocessed)
    for name in ("aaa", "ccc"):
        CounterfactualStore.create(root / name, ["scanner"], f"{GENERATED}{name}")
    assert find_store(preprocessed) is None
    mine = CounterfactualStore.create(root / "bbb", ["scanner"], "generators of a friend")
    assert find_store(preprocessed) == mine.folder


def test_a_manifest_that_cannot_be_read_is_named_when_a_store_is_looked_for(tmp_path):
    folder = default_store_root(tmp_path / "nnUNetPlans_2d") / "aaa"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="aaa/manifest.json is not valid JSON"):
        find_store(tmp_path / "nnUNetPlans_2d")


# ---------------------------------------------------------------- a few planes at a time


def in_slabs(images: np.ndarray, *depths: int):
    """Slabs of (K, C, Z, Y, X) with ``depth`` planes each."""
    for end, depth in zip(np.cumsum(depths), depths):
        yield images[:, :, end - depth : end]


@pytest.mark.parametrize("depths", [(6,), (1,) * 6, (3, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("layout", [(None, None), ((1, 4, 16, 16), (1, 2, 8, 8)), ((2, 1, 20, 18), (2, 1, 20, 18))])
def test_slabs_of_any_depth_give_the_files_that_whole_images_give(store, tmp_path, depths, layout):
    whole = CounterfactualStore.create(tmp_path / "whole", store.interventions, "test")
    images = np.stack([image(7), image(8)])
    store.write_slabs("case_1", store.interventions, SHAPE, in_slabs(images, *depths), *layout)
    for name, one in zip(store.interventions, images):
        whole.write("case_1", name, one, *layout)
        np.testing.assert_array_equal(store.read("case_1", name), one)
        mine, expected = (blosc2.open(str(s.path("case_1", name)), mode="r") for s in (store, whole))
        assert (mine.chunks, mine.blocks, mine.dtype) == (expected.chunks, expected.blocks, expected.dtype)
        # nothing was written twice
        assert store.path("case_1", name).stat().st_size == whole.path("case_1", name).stat().st_size


def test_slabs_that_fail_half_way_keep_the_old_files_and_leave_no_other(store):
    def failing():
        yield np.stack([image(7), image(8)])[:, :, :4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_slabs("case_1", store.interventions, SHAPE, failing(), chunks=(1, 2, 20, 18))
    np.testing.assert_array_equal(store.read("case_1", "vendorB"), image(0))
    np.testing.assert_array_equal(store.read("case_1", "low_field"), image(1))
    assert not list((store.folder / "cases").glob("*.tmp"))


@pytest.mark.parametrize(("depths", "message"), [((4, 1), "have 5 planes, expected 6"), ((6, 1), "does not fit")])
def test_slabs_with_too_few_or_too_many_planes_raise(store, depths, message):
    images = np.zeros((2, 2, 7, 20, 18))
    with pytest.raises(ValueError, match=message):
        store.write_slabs("case_1", store.interventions, SHAPE, in_slabs(images, *depths), chunks=(1, 1, 20, 18))
    np.testing.assert_array_equal(store.read("case_1", "vendorB"), image(0))


def test_slabs_of_an_unknown_intervention_raise(store):
    with pytest.raises(UserError, match="found 'vendorC'"):
        store.write_slabs("case_1", ["vendorB", "vendorC"], SHAPE, iter(()))


def test_file_names_are_split_at_the_last_double_underscore():
    assert split_name("odd__case__low_field") == ("odd__case", "low_field")
    for stem in ("case", "__vendorB", "case__"):
        with pytest.raises(UserError, match="expected a name CASE__INTERVENTION, found"):
            split_name(stem)
