"""Boxes of cases written by nnU-Net's own storage class."""

import pickle
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files import chunk_checksums
from nnunet_cfcl.files.chunk_checksums import add_checksums

SHAPES = {"pat_c": (2, 6, 20, 18), "pat_a": (2, 5, 21, 17), "seg_pat": (2, 1, 9, 30), "pat_b": (2, 7, 16, 16)}
USED = ["seg_pat", "pat_c", "pat_a"]


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Images whose voxels are all different."""
    return {case: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1e5 * n
            for n, (case, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def folder(tmp_path, arrays) -> str:
    for case, array in arrays.items():
        labels = (np.arange(array[0].size).reshape(1, *array.shape[1:]) % 7 - 1).astype(np.int8)
        nnUNetDatasetBlosc2.save_case(array, labels, {"spacing": [1, 1, 1]}, str(tmp_path / case),
                                      chunks=(1, 4, 8, 16), blocks=(1, 2, 4, 8))
    return str(tmp_path)


@pytest.fixture
def cases(folder) -> PreprocessedCases:
    return PreprocessedCases(folder, USED)


@pytest.mark.parametrize(
    "box",
    [
        (slice(0, 1), slice(0, 9), slice(0, 16)),
        (slice(0, 1), slice(8, 9), slice(15, 17)),
        (slice(0, 1), slice(3, 8), slice(7, 16)),
    ],
)
@pytest.mark.parametrize("case", USED)
def test_a_box_equals_that_slice_of_the_whole_image(cases, arrays, case, box):
    part = cases.read(case, box)
    assert part.dtype == np.float32 and isinstance(part, np.ndarray)
    np.testing.assert_array_equal(part, arrays[case][:, box[0], box[1], box[2]])


def test_a_box_across_blocks_and_at_the_end_equals_that_slice(cases, arrays):
    np.testing.assert_array_equal(
        cases.read("pat_c", (slice(1, 6), slice(3, 19), slice(5, 18))), arrays["pat_c"][:, 1:6, 3:19, 5:18])
    whole = tuple(slice(0, n) for n in SHAPES["pat_c"][1:])
    np.testing.assert_array_equal(cases.read("pat_c", whole), arrays["pat_c"])


def test_writing_to_a_returned_box_does_not_change_the_case(cases, arrays):
    box = (slice(0, 2), slice(0, 4), slice(0, 4))
    cases.read("pat_c", box)[:] = -1
    np.testing.assert_array_equal(cases.read("pat_c", box), arrays["pat_c"][:, :2, :4, :4])


def test_shapes_are_those_of_the_preprocessed_images(cases):
    for case in USED:
        assert cases.shape(case) == SHAPES[case]
        assert all(type(n) is int for n in cases.shape(case))


def test_used_and_known_cases_are_sorted(cases):
    assert cases.cases == ("pat_a", "pat_c", "seg_pat")
    assert cases.known == ("pat_a", "pat_b", "pat_c", "seg_pat")


def test_a_pickled_reader_reads_the_same_in_a_worker(cases, arrays):
    cases.read("pat_a", (slice(0, 1), slice(0, 1), slice(0, 1)))
    again = pickle.loads(pickle.dumps(cases))
    assert again.cases == cases.cases and again.known == cases.known
    box = (slice(2, 5), slice(4, 21), slice(1, 17))
    np.testing.assert_array_equal(again.read("pat_a", box), arrays["pat_a"][:, 2:5, 4:21, 1:17])


def test_labels_are_those_stored_and_certain_inside_of_the_image(cases, arrays):
    box = (slice(1, 6), slice(3, 19), slice(5, 18))
    labels, confidence = cases.labels("pat_c", box)
    expected = (np.arange(arrays["pat_c"][0].size).reshape(SHAPES["pat_c"][1:]) % 7 - 1)[box]
    assert labels.dtype == confidence.dtype == np.int16
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(confidence, np.where(expected == -1, 0, 100))


def test_a_case_is_opened_once_for_its_shape_its_boxes_and_its_labels(cases, monkeypatch):
    opened = []
    load = nnUNetDatasetBlosc2.load_case
    monkeypatch.setattr(nnUNetDatasetBlosc2, "load_case", lambda self, case: opened.append(case) or load(self, case))
    box = (slice(0, 1), slice(0, 4), slice(0, 4))
    for case in ("pat_a", "pat_c", "pat_a"):
        cases.shape(case)
        cases.read(case, box)
        cases.read(case, box)
        cases.labels(case, box)
    assert opened == ["pat_a", "pat_c", "pat_a"]


def test_a_box_is_read_from_disk_and_not_from_a_whole_image_in_memory(cases):
    cases.read("pat_c", (slice(0, 1), slice(0, 4), slice(0, 4)))
    assert all(isinstance(one.array, blosc2.NDArray) and one.array.urlpath for one in cases._arrays("pat_c"))


def test_the_digest_of_images_changes_with_an_image_and_that_of_labels_with_a_label(folder, cases, arrays):
    before = cases.content(), cases.label_content()
    labels = np.random.default_rng(0).integers(0, 5, (1, *SHAPES["pat_c"][1:])).astype(np.int8)
    nnUNetDatasetBlosc2.save_case(arrays["pat_c"], labels, {}, f"{folder}/new", chunks=(1, 4, 8, 16),
                                  blocks=(1, 2, 4, 8))
    shutil.copy(f"{folder}/new_seg.b2nd", f"{folder}/pat_c_seg.b2nd")
    assert cases.content() == before[0] and cases.label_content() != before[1]
    shutil.copy(f"{folder}/pat_b.b2nd", f"{folder}/pat_c.b2nd")
    assert cases.content() != before[0]


def test_the_digest_of_images_does_not_depend_on_their_checksums(folder, cases):
    before = cases.content()
    for number in range(3):
        array = blosc2.open(urlpath=f"{folder}/pat_c.b2nd", mode="a")
        array.schunk.vlmeta["cfcl_checksums"] = [number, "x" * 10 ** number]
        assert cases.content() == before


@pytest.mark.parametrize("name", ["pat_c.b2nd", "pat_c_seg.b2nd", "pat_c.pkl"])
def test_a_file_that_cannot_be_opened_is_an_error_that_names_the_command_to_recreate_it(folder, cases, name):
    file = Path(folder, name)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as error:
        cases.shape("pat_c")
    assert str(error.value).startswith(f"{file} cannot be read") and "run nnUNetv2_preprocess" in str(error.value)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        cases.shape("pat_c")
    assert cases.shape("pat_a") == SHAPES["pat_a"]


def test_a_chunk_is_checked_once_and_only_where_it_is_read(folder, cases, arrays, monkeypatch):
    add_checksums(Path(folder, "pat_c.b2nd"))
    box, other, summed = (slice(0, 4), slice(0, 8), slice(0, 16)), (slice(0, 1), slice(0, 1), slice(0, 1)), []
    cases.shape("pat_c")
    plain = chunk_checksums.zlib.crc32
    monkeypatch.setattr(chunk_checksums.zlib, "crc32", lambda data: (summed.append(type(data)), plain(data))[1])
    for _ in range(3):
        np.testing.assert_array_equal(cases.read("pat_c", box), arrays["pat_c"][:, :4, :8, :16])
    # the checksums' own, and a chunk of either channel
    assert len(summed) == 1 + 2
    # of a file without checksums nothing is summed
    cases.read("pat_a", other)
    assert len(summed) == 1 + 2


def test_cases_of_an_older_nnunet_are_read_after_unpacking(tmp_path, arrays):
    labels = np.zeros((1, *SHAPES["pat_c"][1:]), np.int8)
    nnUNetDatasetNumpy.save_case(arrays["pat_c"], labels, {}, str(tmp_path / "pat_c"))
    np.save(tmp_path / "pat_c.npy", arrays["pat_c"])
    np.save(tmp_path / "pat_c_seg.npy", labels)
    cases = PreprocessedCases(str(tmp_path), ["pat_c"])
    box = (slice(1, 6), slice(3, 19), slice(5, 18))
    assert cases.known == ("pat_c",) and cases.shape("pat_c") == SHAPES["pat_c"]
    np.testing.assert_array_equal(cases.read("pat_c", box), arrays["pat_c"][:, 1:6, 3:19, 5:18])
    assert (cases.labels("pat_c", box)[0] == 0).all()
    assert all(isinstance(one.array, np.memmap) for one in cases._arrays("pat_c"))
