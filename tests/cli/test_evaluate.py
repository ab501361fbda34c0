"""The command `nnunet_cfcl evaluate` on folders of small masks."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from PIL import Image

from nnunet_cfcl import cli

COLUMNS = ["case", "label", "dice", "hd95_mm", "assd_mm", "nsd"]


@pytest.fixture
def folders(tmp_path, write_mask, box):
    """Eight cases of four patients; predictions are shifted by at most one voxel in ``good``, three in ``poor``."""
    random = np.random.default_rng(0)
    for number in range(8):
        for name, error in (("truth", 0), ("good", 1), ("poor", 3)):
            first = random.integers(0, error + 1, 3) + [1, 3, 3]
            write_mask(tmp_path / name / f"c{number}.nii.gz", box(first), (2.0, 1.0, 1.0))
    rows = "".join(f"c{number},p{number // 2},{'ab'[number % 2]},{'xy'[number > 3]}\n" for number in range(8))
    (tmp_path / "attributes.csv").write_text("case,patient,scanner,disease\n" + rows)
    return tmp_path


def run(folder, *arguments):
    return cli.main(["evaluate", "-p", str(folder / "good"), "-g", str(folder / "truth"), "-o", str(folder / "out"),
                     "-np", "1", *map(str, arguments)])


def error_of(folder, capsys, *arguments):
    assert run(folder, *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def table(folder, name="metrics.csv"):
    with open(folder / "out" / name, newline="") as handle:
        return list(csv.DictReader(handle))


def numbers(folder):
    return json.loads((folder / "out" / "metrics.json").read_text())


def find(records, **wanted):
    (found,) = [one for one in records if all(one[key] == value for key, value in wanted.items())]
    return found


def test_two_folders_give_a_table_json_a_page_and_a_plot(folders, capsys):
    assert run(folders) == 0
    rows = table(folders)
    assert list(rows[0]) == COLUMNS
    assert [(row["case"], row["label"]) for row in rows] == [(f"c{number}", "1") for number in range(8)]
    for row in rows:
        pair = [str(folders / name / f"{row['case']}.nii.gz") for name in ("truth", "good")]
        assert float(row["dice"]) == pytest.approx(compute_metrics(*pair, SimpleITKIO(), [1])["metrics"][1]["Dice"])
    dice = np.array([float(row["dice"]) for row in rows])
    found = find(numbers(folders)["summaries"], metric="dice")
    assert (found["mean"], found["std"], found["median"], found["cases"], found["patients"]) == pytest.approx(
        (dice.mean(), dice.std(ddof=1), np.median(dice), 8, 8))
    assert found["low"] < found["mean"] < found["high"]
    assert "# Evaluation of good" in (folders / "out" / "metrics.md").read_text()
    with Image.open(folders / "out" / "metrics.png") as picture:
        assert picture.size[0] > 1000
    assert f"Look at {folders / 'out' / 'metrics.md'}" in capsys.readouterr().out


def test_groups_patients_and_gaps_come_from_the_attributes(folders):
    assert run(folders, "--attributes", folders / "attributes.csv", "--by", "scanner", "disease") == 0
    rows, found = table(folders), numbers(folders)
    assert list(rows[0]) == [*COLUMNS, "patient", "scanner", "disease"]
    assert find(found["summaries"], metric="dice", grouping="all")["patients"] == 4
    means = {group: np.mean([float(row["dice"]) for row in rows if row["scanner"] == group]) for group in "ab"}
    for group, mean in means.items():
        one = find(found["summaries"], metric="dice", grouping="scanner", group=group)
        assert (one["mean"], one["cases"], one["patients"]) == pytest.approx((mean, 4, 4))
    gap = find(found["gaps"], metric="dice", grouping="scanner")
    assert (gap["worst"], gap["best"]) == tuple(sorted(means, key=means.__getitem__))
    assert gap["gap"] == pytest.approx(abs(means["a"] - means["b"]))
    distance = find(found["gaps"], metric="assd_mm", grouping="scanner")
    assert distance["worst_mean"] >= distance["best_mean"]
    assert {one["group"] for one in found["summaries"] if one["grouping"] == "scanner x disease"} == {
        "a x x", "a x y", "b x x", "b x y"}
    assert "## By scanner x disease" in (folders / "out" / "metrics.md").read_text()


def test_a_group_can_have_any_name(folders):
    """matplotlib parses text between two $ as mathematics."""
    file = folders / "attributes.csv"
    file.write_text(file.read_text().replace(",a,", r",GE $\foo$,"))
    assert run(folders, "--attributes", file, "--by", "scanner") == 0
    assert {row["scanner"] for row in table(folders)} == {r"GE $\foo$", "b"}
    assert (folders / "out" / "metrics.png").exists()


def test_methods_are_compared_case_by_case(folders):
    assert run(folders, "--against", folders / "poor", f"same={folders / 'good'}", "--attributes", folders,
               "--by", "scanner") == 0
    dice = [np.array([float(row["dice"]) for row in table(folders, name)])
            for name in ("metrics.csv", "metrics_poor.csv", "metrics_same.csv")]
    found = numbers(folders)["differences"]
    poor = find(found, against="poor", metric="dice", grouping="all")
    assert poor["difference"] == pytest.approx((dice[0] - dice[1]).mean())
    assert poor["low"] <= poor["difference"] <= poor["high"]
    # four patients: 16 ways to flip them
    assert (poor["p_value"] * 16) % 1 == 0
    same = find(found, against="same", metric="hd95_mm", grouping="all")
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)
    assert find(found, against="poor", metric="dice", grouping="scanner", group="a")["cases"] == 4
    page = (folders / "out" / "metrics.md").read_text()
    assert "## good minus poor" in page and "## good minus same" in page


def test_results_depend_on_the_seed_and_not_on_the_number_of_processes(folders):
    assert run(folders, "--against", folders / "poor") == 0
    before = numbers(folders)
    assert run(folders, "--against", folders / "poor", "-np", "2") == 0
    assert numbers(folders) == before
    assert run(folders, "--against", folders / "poor", "--seed", "1") == 0
    assert numbers(folders)["summaries"] != before["summaries"]


def test_cases_missing_on_one_side_are_listed_in_log_page_and_json(folders, capsys):
    (folders / "good" / "c1.nii.gz").unlink()
    (folders / "truth" / "c2.nii.gz").unlink()
    (folders / "poor" / "c3.nii.gz").unlink()
    assert run(folders, "--against", folders / "poor") == 0
    out, page, found = capsys.readouterr().out, (folders / "out" / "metrics.md").read_text(), numbers(folders)
    assert found["missing"] == {"good": {"without_prediction": ["c1"], "without_truth": ["c2"]},
                                "poor": {"without_prediction": ["c3"], "without_truth": ["c2"]}}
    for text in ("good: 1 case with a truth but no prediction, not evaluated: c1",
                 "good: 1 case with a prediction but no truth, not evaluated: c2",
                 "poor: 1 case with a truth but no prediction, not evaluated: c3"):
        assert text in out and text in page
    assert find(found["differences"], metric="dice")["cases"] == 5


def test_cases_without_a_row_are_listed_and_in_the_group_unknown(folders, capsys):
    lines = (folders / "attributes.csv").read_text().splitlines()
    (folders / "attributes.csv").write_text("\n".join(lines[:-1]))
    assert run(folders, "--attributes", folders, "--by", "scanner") == 0
    assert 'in the group "unknown": c7' in capsys.readouterr().out
    found = numbers(folders)
    assert found["without_attributes"] == ["c7"]
    assert find(found["summaries"], grouping="scanner", group="unknown", metric="dice")["cases"] == 1
    assert "unknown" not in {one[key] for one in found["gaps"] for key in ("worst", "best")}


def test_missed_labels_are_counted_and_penalised(folders, write_mask, box):
    nothing = np.zeros((8, 12, 12), np.uint8)
    write_mask(folders / "good" / "c0.nii.gz", nothing, (2.0, 1.0, 1.0))
    for name in ("truth", "good"):
        write_mask(folders / name / "c1.nii.gz", nothing, (2.0, 1.0, 1.0))
    assert run(folders, "--against", folders / "poor") == 0
    rows, found = table(folders), numbers(folders)
    assert [row["dice"] for row in rows[:2]] == ["0.0", "nan"]
    assert [row["hd95_mm"] for row in rows[:2]] == ["nan", "nan"]
    dice, plain, penalised = (find(found["summaries"], metric=metric, method="good")
                              for metric in ("dice", "hd95_mm", "hd95_mm_penalised"))
    assert (dice["cases"], dice["one_empty"], dice["both_empty"]) == (7, 1, 1)
    assert (plain["cases"], plain["one_empty"]) == (6, 1)
    longest = np.hypot(16, np.hypot(12, 12))
    assert penalised["mean"] == pytest.approx((6 * plain["mean"] + longest) / 7)
    # c0: good has no distance; c1: poor has a false structure, good correctly has none
    assert find(found["differences"], metric="hd95_mm")["left_out"] == 2
    assert find(found["differences"], metric="dice")["left_out"] == 1
    assert "HD95 (mm) with misses" in (folders / "out" / "metrics.md").read_text()


def test_png_masks_are_measured_in_pixels(tmp_path, write_mask, box):
    for name, first in (("truth", (2, 2)), ("good", (2, 3))):
        for case in "ab":
            write_mask(tmp_path / name / f"{case}.png", box(first, 5, (20, 20), 255))
    assert run(tmp_path, "--tolerance", "0.5") == 0
    rows, found = table(tmp_path), numbers(tmp_path)
    assert [(row["case"], row["label"], row["hd95_mm"]) for row in rows] == [("a", "255", "1.0"), ("b", "255", "1.0")]
    assert found["settings"]["unit"] == "pixels"
    # of the 16 contour pixels of a 5 x 5 square, the 5 outside and 3 inside the other square are one pixel away
    assert float(rows[0]["nsd"]) == 8 / 16
    assert "HD95 (pixels)" in (tmp_path / "out" / "metrics.md").read_text()


def test_only_labels_of_a_dataset_json_are_evaluated_and_others_are_listed(folders, write_mask, box, capsys):
    (folders / "good" / "dataset.json").write_text(json.dumps(
        {"labels": {"background": 0, "organ": 1, "lesion": 2, "ignore": 9}, "file_ending": ".nii.gz"}))
    write_mask(folders / "good" / "c0.nii.gz", box((1, 3, 3)) + box((6, 8, 8), 2, label=4), (2.0, 1.0, 1.0))
    assert run(folders) == 0
    assert "not evaluated: 4" in capsys.readouterr().out
    found = numbers(folders)
    assert found["settings"]["labels"] == [1, 2]
    assert (found["settings"]["ignore_label"], found["settings"]["undeclared_labels"]) == (9, [4])
    assert find(found["summaries"], label=2, metric="dice")["both_empty"] == 8
    assert "1 (organ)" in (folders / "out" / "metrics.md").read_text()


@pytest.mark.parametrize(("shape", "spacing", "origin", "expected"), [
    ((8, 12, 11), (2.0, 1.0, 1.0), None, r"shapes (8, 12, 12) and (8, 12, 11)"),
    ((8, 12, 12), (2.5, 1.0, 1.0), None, r"spacings (2, 1, 1) and (2.5, 1, 1) mm"),
    ((8, 12, 12), (2.0, 1.0, 1.0), (0.0, 1.0, 0.0), r"origins (0, 0, 0) and (0, 1, 0) mm"),
])
def test_the_error_for_different_grids_names_both_files(
        folders, write_mask, box, capsys, shape, spacing, origin, expected):
    file = write_mask(folders / "good" / "c3.nii.gz", box((1, 3, 3), shape=shape), spacing, origin)
    error = error_of(folders, capsys)
    assert expected in error and str(file) in error and str(folders / "truth" / "c3.nii.gz") in error


def test_a_png_against_an_image_in_millimetres_is_an_error(folders, write_mask, box, capsys):
    (folders / "good" / "c0.nii.gz").unlink()
    write_mask(folders / "truth" / "c0.nii.gz", box((2, 2), 5, (20, 20)))
    write_mask(folders / "good" / "c0.png", box((2, 2), 5, (20, 20)))
    assert "the other only pixels" in error_of(folders, capsys)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda labels: labels + 0.5, "values that are not labels, such as 0.5"),
    (lambda labels: labels - 1.0, "values that are not labels, such as -1"),
    (lambda labels: np.arange(labels.size, dtype=np.float64).reshape(labels.shape), "1152 different values"),
])
def test_images_and_probabilities_are_rejected_as_masks(folders, write_mask, box, capsys, change, expected):
    write_mask(folders / "good" / "c0.nii.gz", change(box((1, 3, 3)).astype(np.float64)), (2.0, 1.0, 1.0))
    assert expected in error_of(folders, capsys)


def test_the_error_names_unreadable_files_and_colour_pictures(folders, tmp_path, capsys):
    (folders / "good" / "c0.nii.gz").write_bytes(b"no image")
    assert f"{folders / 'good' / 'c0.nii.gz'} cannot be read as a mask" in error_of(folders, capsys)
    Image.new("RGB", (20, 20)).save(folders / "truth" / "z.png")
    Image.new("RGB", (20, 20)).save(folders / "poor" / "z.png")
    for file in folders.glob("poor/*.nii.gz"):
        file.unlink()
    assert cli.main(["evaluate", "-p", str(folders / "poor"), "-g", str(folders / "truth"), "-o", str(folders / "out"),
                     "-np", "1"]) == 1
    assert "has 3 channels" in capsys.readouterr().err


def test_the_error_for_wrong_folders_names_and_columns_has_a_fix(folders, write_mask, box, capsys):
    assert "nowhere is not a folder" in error_of(folders, capsys, "--against", folders / "nowhere")
    expected = "two folders are named good, expected unique names; fix: give them names, as in --against other="
    assert expected in error_of(folders, capsys, "--against", folders / "good")
    assert "found patient, scanner, disease; fix: write --by scanner" in error_of(
        folders, capsys, "--attributes", folders, "--by", "scaner")
    assert "--tolerance and --seed to be 0 or more, found -1 and 0" in error_of(folders, capsys, "--tolerance", "-1")
    assert "is a folder of masks, expected a separate folder; fix: write -o" in error_of(
        folders, capsys, "-o", folders / "truth")
    write_mask(folders / "other" / "z.nii.gz", box((1, 3, 3)))
    assert "have no case in common: found z, expected c0" in error_of(folders, capsys, "--against", folders / "other")
    assert not (folders / "out" / "metrics.csv").exists()


def test_masks_with_only_background_are_an_error(tmp_path, write_mask, capsys):
    for name in ("truth", "good"):
        write_mask(tmp_path / name / "a.nii.gz", np.zeros((3, 4, 5), np.uint8))
    assert "contain only background (0), expected labels of 1 or more" in error_of(tmp_path, capsys)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe that has a name")
def test_the_error_of_a_case_is_raised_while_another_case_blocks(tmp_path):
    os.mkfifo(tmp_path / "a_pipe.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    script = ("from pathlib import Path\n"
              "from nnunet_cfcl.evaluation.masks.measure import measure\n"
              "from nnunet_cfcl.evaluation.masks.tables import LabelScheme, MaskFolder\n"
              "if __name__ == '__main__':\n"
              f"    folder = Path({str(tmp_path)!r})\n"
              "    files = {name: folder / f'{name}.png' for name in ('a_pipe', 'broken')}\n"
              "    masks = MaskFolder('masks', folder, files)\n"
              "    measure(masks, [masks], LabelScheme(), 1.0, 2)\n")
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "UserError: " in done.stderr and "broken.png cannot be read" in done.stderr
