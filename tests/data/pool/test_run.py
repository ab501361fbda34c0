"""The verb `pool` on small images: stored files, rejected input, resuming after an interruption."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from skimage import io

from nnunet_cfcl import cli
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.patients import known_patients
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest, silver_folder
from nnunet_cfcl.data.pool.preprocess import CasePreprocessing, scratch_folder
from nnunet_cfcl.data.pool.run import preprocess_pool
from nnunet_cfcl.data.pool.silver_labels import SilverLabels
from nnunet_cfcl.errors import UserError

DATASET = "Dataset007_Toy"
SHAPE = (20, 28)
WHOLE = (slice(None),) * 3


@pytest.fixture
def raw(toy):
    folder = toy / "nnUNet_raw" / DATASET
    for name in ("imagesUn", "labelsSilver"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
def preprocessed(toy):
    return toy / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_2d"


def write(path: Path, array: np.ndarray) -> None:
    io.imsave(path, array.astype(np.uint8), check_contrast=False)


def add(raw: Path, *cases: str, silver: bool = False, shape: tuple[int, int] = SHAPE) -> None:
    for case in cases:
        random = np.random.default_rng(sum(case.encode()))
        write(raw / "imagesUn" / f"{case}_0000.png", random.integers(1, 255, shape))
        if silver:
            write(raw / "labelsSilver" / f"{case}.png", random.integers(0, 2, shape))


def run(**arguments):
    lines: list[str] = []
    preprocess_pool("7", "2d", log=lines.append, **arguments)
    return "\n".join(lines)


def load(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    image, segmentation, _, _ = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    return image[:], segmentation[:]


def problems(error: pytest.ExceptionInfo) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]


def test_a_case_is_stored_as_nnunet_stores_cases_with_labels_and_confidence(raw, preprocessed):
    add(raw, "plain", "zebra")
    add(raw, "labelled", silver=True)
    (raw / "labelsSilver" / "silver.csv").write_text("case,quality\nlabelled,0.625\n")
    message = run()
    folder = pool_folder(preprocessed)
    assert folder == preprocessed.with_name("nnUNetPlans_2d_cfcl_pool")
    assert sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder))) == ["labelled", "plain", "zebra"]
    image, channels = load(folder, "labelled")
    pixels = io.imread(raw / "imagesUn" / "labelled_0000.png").astype(np.float32)
    np.testing.assert_allclose(image[0, 0], (pixels - pixels.mean()) / pixels.std(), atol=1e-4)
    np.testing.assert_array_equal(channels[0, 0], io.imread(raw / "labelsSilver" / "labelled.png"))
    assert channels.shape == (2, 1, *SHAPE) and (channels[1] == 62).all()
    channels = load(folder, "plain")[1]
    assert (channels[0] == -1).all() and (channels[1] == 100).all()
    records = read_manifest(folder).cases
    assert [(case, record.silver, record.quality, record.quality_given) for case, record in records.items()] == [
        ("labelled", True, 0.625, True), ("plain", False, 1.0, False), ("zebra", False, 1.0, False)]
    assert records["plain"].shape == (1, 1, *SHAPE)
    assert "3 cases of the pool (1 with silver labels, mean quality 0.62 of the 1 given, 0 with a confidence" in message
    assert message.endswith("next: nnUNetv2_train 7 2d 0 -tr nnUNetTrainerSDVDCL")
    assert not silver_folder(preprocessed).exists() and read_manifest(silver_folder(preprocessed)) is None


@pytest.mark.end_to_end
def test_several_processes_store_the_same_as_one(raw, preprocessed):
    add(raw, "a", "b", "c", silver=True)
    run()
    alone = read_manifest(pool_folder(preprocessed))
    shutil.rmtree(pool_folder(preprocessed))
    run(processes=2)
    assert read_manifest(pool_folder(preprocessed)).content() == alone.content()


def test_the_command_prints_the_folder_of_the_pool_and_the_next_command(raw, preprocessed, capsys):
    add(raw, "a")
    assert cli.main(["pool", "-d", DATASET, "-c", "2d", "-p", "nnUNetPlans", "-np", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"1 cases of the pool (no silver labels) in {pool_folder(preprocessed)}" in shown
    assert "next: nnUNetv2_train 7 2d 0 -tr nnUNetTrainerDVDCL\n" in shown


def test_a_second_run_preprocesses_only_new_changed_and_lost_cases(raw, preprocessed):
    add(raw, "a", "b", "c", "d", silver=True)
    run()
    folder = pool_folder(preprocessed)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run().startswith("4 cases of the pool (0 new, 4 with silver labels")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    write(raw / "labelsSilver" / "b.png", np.ones(SHAPE))
    (folder / "c.pkl").unlink()
    for path in (raw / "imagesUn" / "d_0000.png", raw / "labelsSilver" / "d.png"):
        path.unlink()
    add(raw, "e")
    message = run()
    assert "2 cases changed and are preprocessed again: b, c" in message
    assert "1 cases are gone from the raw dataset and removed: d" in message
    assert "4 cases of the pool (3 new" in message
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in after if after[name] == before.get(name)} == {"a.b2nd", "a_seg.b2nd", "a.pkl"}
    assert sorted(read_manifest(folder).cases) == ["a", "b", "c", "e"]
    assert not any(name.startswith("d") for name in after)
    assert load(folder, "b")[1][0].min() == 1


def test_a_pool_that_was_emptied_is_removed_while_one_whose_folders_are_missing_is_kept(raw, preprocessed):
    add(raw, "a", "b", silver=True)
    run()
    for name in ("imagesUn", "labelsSilver"):
        (raw / name).rename(raw / f"away_{name}")
    with pytest.raises(UserError, match="no images"):
        run()
    assert len(read_manifest(pool_folder(preprocessed)).cases) == 2
    (raw / "imagesUn").mkdir()
    assert "2 cases are gone from the raw dataset and removed: a, b" in run()
    assert not pool_folder(preprocessed).exists() and read_manifest(pool_folder(preprocessed)) is None
    with pytest.raises(UserError, match="no images"):
        run()


def test_a_table_of_patients_with_file_names_is_listed_with_the_other_problems(raw, preprocessed):
    add(raw, "a")
    write(raw / "imagesUn" / "b_0001.png", np.ones(SHAPE))
    (raw / "attributes.csv").write_text("case,patient\na_0000,p1\ntoy_1.png,p1\n")
    with pytest.raises(UserError) as error:
        run()
    found = problems(error)
    assert len(found) == 2 and "2 names of files where names of cases are expected: a_0000, toy_1.png" in found[1]
    assert not pool_folder(preprocessed).exists()


def test_every_array_has_checksums_and_a_damaged_one_is_recreated_after_deletion(raw, preprocessed):
    add(raw, "a", silver=True)
    write(raw / "imagesTr" / "toy_0_0000.png", np.arange(24 * 24).reshape(24, 24) % 251)
    write(raw / "labelsSilver" / "toy_0.png", np.ones((24, 24)))
    write_pickle({"shape_before_cropping": (1, 24, 24)}, str(preprocessed / "toy_0.pkl"))
    run()
    pool, silver = pool_folder(preprocessed), silver_folder(preprocessed)
    readers = {pool / "a.b2nd": lambda: PreprocessedCases(str(pool), ["a"]).read("a", WHOLE),
               pool / "a_seg.b2nd": lambda: SilverLabels(preprocessed).read("a", WHOLE),
               silver / "toy_0.b2nd": lambda: SilverLabels(preprocessed).read("toy_0", WHOLE)}
    for file, read in readers.items():
        whole, expected = file.read_bytes(), read()
        assert b"cfcl_checksums" in whole
        damaged = bytearray(whole)
        # the chunk of the first voxels: the header, of a fixed size, names its own length
        damaged[int.from_bytes(whole[11:15], "big") + 40] ^= 1
        for content in (damaged, whole[: len(whole) // 2]):
            file.write_bytes(content)
            with pytest.raises(UserError, match=f"{re.escape(str(file))} cannot be read.*run nnunet_cfcl pool again"):
                read()
        file.unlink()
        run()
        # not byte by byte: blosc2's threads write the blocks of a chunk in any order
        assert b"cfcl_checksums" in file.read_bytes() and np.array_equal(read(), expected)


def test_a_changed_quality_and_a_removed_label_are_detected(raw, preprocessed):
    add(raw, "a", "b", silver=True)
    run()
    (raw / "labelsSilver" / "silver.csv").write_text("case,quality\na,0.5\n")
    (raw / "labelsSilver" / "b.png").unlink()
    assert "2 cases changed and are preprocessed again: a, b" in run()
    assert (load(pool_folder(preprocessed), "a")[1][1] == 50).all()
    assert (load(pool_folder(preprocessed), "b")[1][0] == -1).all()


def test_another_plan_preprocesses_the_whole_pool_again(raw, preprocessed, change_plan):
    add(raw, "a", "b")
    run()
    assert load(pool_folder(preprocessed), "a")[0].shape == (1, 1, *SHAPE)
    change_plan(lambda plan: plan["configurations"]["2d"].update(spacing=[2.0, 2.0]))
    assert "the plan or the labels changed, all cases are preprocessed again" in run()
    assert load(pool_folder(preprocessed), "a")[0].shape == (1, 1, SHAPE[0] // 2, SHAPE[1] // 2)


def test_configurations_with_the_same_preprocessed_data_share_a_pool(raw, preprocessed):
    add(raw, "a", "b")
    run()
    lines: list[str] = []
    preprocess_pool("7", "2d_small", log=lines.append)
    assert lines[0].startswith("2 cases of the pool (0 new")


def test_an_error_in_the_middle_keeps_finished_cases_and_lists_no_unfinished_one(
        raw, preprocessed, monkeypatch):
    add(raw, "a", "b", "c", "d")
    original, calls = CasePreprocessing._save_case, []

    def fail_in_the_third(self, target, *rest):
        calls.append(target)
        if len(calls) == 3:
            Path(f"{target}.b2nd").write_bytes(b"half a file")
            raise OSError("no space left on device")
        original(self, target, *rest)

    monkeypatch.setattr(CasePreprocessing, "_save_case", fail_in_the_third)
    with pytest.raises(OSError, match="no space left"):
        run()
    folder = pool_folder(preprocessed)
    manifest = read_manifest(folder)
    assert sorted(manifest.cases) == ["a", "b"] and not manifest.complete
    assert not (folder / "c.b2nd").exists() and not scratch_folder(folder).exists()
    stamp = (folder / "a.b2nd").stat().st_mtime_ns
    assert "4 cases of the pool (2 new" in run()
    assert read_manifest(folder).complete and len(calls) == 5
    assert (folder / "a.b2nd").stat().st_mtime_ns == stamp
    assert load(folder, "c")[0].shape == (1, 1, *SHAPE)


@pytest.mark.end_to_end
def test_a_kill_leaves_no_case_in_the_manifest_whose_files_are_not_complete(raw, preprocessed):
    add(raw, *(f"case{index:02d}" for index in range(40)), silver=True, shape=(200, 220))
    script = ("from nnunet_cfcl.data.pool import run\nrun.SAVE_EVERY_S = 0\n"
              "run.preprocess_pool('7', '2d')")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, deadline = pool_folder(preprocessed), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (manifest := read_manifest(folder)) and len(manifest.cases) >= 3:
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    manifest = read_manifest(folder)
    assert 3 <= len(manifest.cases) < 40 and not manifest.complete
    for case, record in manifest.cases.items():
        assert load(folder, case)[0].shape == record.shape
    assert f"40 cases of the pool ({40 - len(manifest.cases)} new, 40 with silver" in run()
    assert not scratch_folder(folder).exists()
    assert load(folder, "case39")[0].shape == (1, 1, 200, 220)


def test_a_killed_worker_process_is_an_error_that_says_so(raw, kill_first_child):
    add(raw, "a", "b")
    with kill_first_child, pytest.raises(UserError, match="a process was killed, probably for lack of memory.*"
                                                          "smaller -np"):
        run(processes=2)


def test_every_invalid_image_and_label_is_listed_in_one_error_and_nothing_is_written(raw, preprocessed):
    add(raw, "good", "other", silver=True)
    add(raw, "wide", "tall", "toy_0", "toy_3")
    write(raw / "labelsSilver" / "wide.png", np.zeros((20, 29)))
    write(raw / "labelsSilver" / "tall.png", np.zeros((21, 28)))
    write(raw / "labelsSilver" / "other.png", np.full(SHAPE, 7))
    write(raw / "labelsSilver" / "lonely.png", np.zeros(SHAPE))
    write(raw / "imagesUn" / "colour_0000.png", np.ones((*SHAPE, 3)))
    write(raw / "imagesUn" / "late_0001.png", np.ones(SHAPE))
    write(raw / "imagesUn" / "unnamed.png", np.ones(SHAPE))
    (raw / "imagesUn" / "broken_0000.png").write_bytes(b"no picture")
    write(raw / "labelsSilver" / "good.png", np.zeros((*SHAPE, 3)))
    rows = "good,best\nother,2\nother,0.5\nnobody,1\ngood_0000,1\n"
    (raw / "labelsSilver" / "silver.csv").write_text("case,quality\n" + rows)
    with pytest.raises(UserError, match=r"^15 problems in .*nothing was written") as error:
        run()
    lines = problems(error)
    wanted = [r"case toy_0 is also in imagesTr", r"case toy_3 is also in imagesTr",
              r"unnamed\.png: must be named CASE_0000", r"late_0000\.png: missing",
              r"lonely\.png: no image of case lonely",
              r"silver\.csv line 2: the quality of case good .* found 'best'", r"line 3: .* other .* found '2'",
              r"line 4: case other has more than one row", r"silver\.csv has 1 names of files .*: good_0000;",
              r"broken_0000\.png: cannot be read \(.+\)", r"colour_0000\.png: has 3 channels, expected 1 \(xray\)",
              r"wide\.png: has shape \(1, 20, 29\), expected \(1, 20, 28\) as its image",
              r"tall\.png: has shape \(1, 21, 28\), expected \(1, 20, 28\) as its image",
              r"other\.png: has the values 7, .*known: 0, 1\)",
              r"good\.png: has 3 channels, expected 1 \(a label map\)"]
    for pattern in wanted:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, pattern
    assert len(lines) == len(wanted)
    assert not pool_folder(preprocessed).exists() and read_manifest(pool_folder(preprocessed)) is None


def test_a_case_without_one_of_its_channels_is_listed_with_the_missing_file(raw, toy):
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        file = toy / folder / DATASET / "dataset.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "channel_names": {"0": "CT", "1": "PET"}}))
    add(raw, "one", "two", "both")
    write(raw / "imagesUn" / "both_0001.png", np.ones(SHAPE))
    write(raw / "imagesUn" / "odd_0000.png", np.ones(SHAPE))
    write(raw / "imagesUn" / "odd_0001.png", np.ones((3, 3)))
    with pytest.raises(UserError) as error:
        run()
    lines = problems(error)
    assert len(lines) == 3
    assert "odd_0000.png to odd_0001.png: cannot be read (ERROR! Not all input images have the same shape!)" in lines[0]
    for line, case in zip(lines[1:], ("one", "two")):
        assert f"{case}_0000.png: has 1 channels, expected 2 (CT, PET); {case}_0001.png missing" in line


def test_intensities_that_are_not_finite_are_rejected(raw, toy):
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        file = toy / folder / DATASET / "dataset.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "file_ending": ".tif"}))
    for case, value in (("nan", np.nan), ("infinite", np.inf), ("good", 2)):
        pixels = np.ones(SHAPE, np.float32)
        pixels[3, 4:6] = value
        io.imsave(raw / "imagesUn" / f"{case}_0000.tif", pixels, check_contrast=False)
    with pytest.raises(UserError) as error:
        run()
    assert [line.split("/")[-1] for line in problems(error)] == [
        "infinite_0000.tif: 2 voxels are not finite (NaN or infinite)",
        "nan_0000.tif: 2 voxels are not finite (NaN or infinite)"]


def test_probabilities_that_do_not_match_the_label_are_rejected(raw):
    add(raw, "empty", "flat", "large", "nan", "swapped", "torn", silver=True)
    good = np.full((2, 1, *SHAPE), 0.5, np.float32)
    np.savez(raw / "labelsSilver" / "empty.npz", softmax=good)
    np.savez(raw / "labelsSilver" / "flat.npz", probabilities=good[:, 0])
    np.savez(raw / "labelsSilver" / "large.npz", probabilities=good * 20)
    np.savez(raw / "labelsSilver" / "nan.npz", probabilities=good * np.nan)
    np.savez(raw / "labelsSilver" / "swapped.npz", probabilities=good.transpose(0, 1, 3, 2))
    (raw / "labelsSilver" / "torn.npz").write_bytes(b"PK")
    with pytest.raises(UserError) as error:
        run()
    wanted = ["empty.npz: has no array 'probabilities'", "flat.npz: probabilities of shape (2, 20, 28), expected (2, 1",
              "large.npz: probabilities from 10 to 10", "nan.npz: probabilities from nan to nan",
              "swapped.npz: probabilities of shape (2, 1, 28, 20), expected (2, 1, 20, 28)", "torn.npz: cannot be read"]
    lines = problems(error)
    assert len(lines) == len(wanted)
    for line, text in zip(lines, wanted):
        assert text in line


@pytest.mark.parametrize("folder_there", [True, False])
def test_an_empty_or_missing_pool_is_an_error_that_names_the_folder_for_images(raw, folder_there):
    if not folder_there:
        (raw / "imagesUn").rmdir()
        (raw / "labelsSilver").rmdir()
    with pytest.raises(UserError, match=r"no images in .*imagesUn and no silver labels.*CASE_0000\.png into imagesUn"):
        run()


def test_a_silver_label_of_a_training_case_needs_the_preprocessed_case(raw, preprocessed):
    for case in ("toy_0", "toy_1"):
        write(raw / "imagesTr" / f"{case}_0000.png", np.ones(SHAPE))
        write(raw / "labelsSilver" / f"{case}.png", np.ones(SHAPE))
    for file in preprocessed.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="^2 problems") as error:
        run()
    for line, case in zip(problems(error), ("toy_0", "toy_1")):
        fault = f"there is no preprocessed training case {case} in {preprocessed}; fix: run nnUNetv2_preprocess -d 7"
        assert fault in line


def test_the_ignore_label_may_be_used_and_region_labels_are_known(raw, toy, preprocessed):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        file = toy / folder / DATASET / "dataset.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "labels": labels, "regions_class_order": [1, 2]}))
    add(raw, "a", "b", silver=True)
    label = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) % 4
    write(raw / "labelsSilver" / "a.png", label)
    # (whole, core): both are sure of label 2 everywhere
    np.savez(raw / "labelsSilver" / "a.npz", probabilities=np.full((2, 1, *SHAPE), 0.9, np.float32))
    run()
    channels = load(pool_folder(preprocessed), "a")[1]
    np.testing.assert_array_equal(channels[0, 0], label)
    np.testing.assert_array_equal(channels[1, 0], np.array([10, 10, 90, 100])[label])
    assert read_manifest(pool_folder(preprocessed)).cases["a"].probabilities


@pytest.mark.parametrize(("arguments", "message"), [
    (("8", "2d"), "no dataset 8 in nnUNet_raw or nnUNet_preprocessed"),
    (("7", "3d"), "the plan nnUNetPlans has no configuration 3d"),
    (("7", "2d", "nnUNetPlan"), "has no plan nnUNetPlan .*; fix: -p nnUNetPlans"),
])
def test_an_unknown_dataset_plan_or_configuration_is_an_error_that_names_the_closest_match(raw, arguments, message):
    with pytest.raises(UserError, match=message):
        preprocess_pool(*arguments)


def test_without_the_raw_dataset_the_error_names_the_variable(raw, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="no folder Dataset007_Toy in nnUNet_raw"):
        run()


# --- patients


def test_the_patients_of_all_cases_are_stored_for_trainings_without_the_raw_dataset(raw, preprocessed):
    add(raw, "a")
    run()
    assert not known_patients(None, preprocessed.parent).table
    (raw / "attributes.csv").write_text("case,patient\na,p1\ntoy_0,p1\ntoy_1,\n")
    assert known_patients(raw, preprocessed.parent).outdated
    run()
    assert known_patients(None, preprocessed.parent).names == {"a": "p1", "toy_0": "p1"}
    assert not known_patients(raw, preprocessed.parent).outdated


def test_a_table_of_patients_that_cannot_be_read_is_listed_with_the_invalid_images(raw, preprocessed):
    add(raw, "toy_0", "good")
    (raw / "attributes.csv").write_text("case,patient\na,p1\na,p2\n")
    with pytest.raises(UserError, match="2 problems in .*nothing was written") as error:
        run()
    assert "attributes.csv has 1 errors: case a has more than one row" in "".join(problems(error))
    assert not pool_folder(preprocessed).exists() and not (preprocessed.parent / "cfcl_patients.json").exists()
