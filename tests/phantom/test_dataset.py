"""The raw dataset on disk, as nnU-Net sees it, its picture and the command."""

import argparse
import csv
import json

import numpy as np
import pytest

from nnunet_cfcl.cli.phantom import add_phantom_parser
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phantom import contact_sheet, counterfactual, phantom_cases, render, write_phantom_dataset
from nnunet_cfcl.phantom.dataset import FILE_ENDING, LEVELS, assign_attributes
from nnunet_cfcl.phantom.scm import DEFAULT_SPACING, INTERVENTIONS

SHAPE = {2: (32, 32), 3: (16, 20, 22)}


def write(folder, dim=2, patients=3, **options):
    options = {"progress": False, "shape": SHAPE[dim], **options}
    return write_phantom_dataset(folder, 900 + dim, "Phantom", dim, patients, 2, seed=5, **options)


def read(path, dim):
    if dim == 2:
        from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO as Reader
    else:
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO as Reader
    array, properties = Reader().read_images((str(path),))
    return array[0].reshape(SHAPE[dim]), properties["spacing"]


@pytest.mark.parametrize("dim", [2, 3])
def test_nnunet_accepts_the_dataset(tmp_path, dim):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder = write(tmp_path, dim)
    verify_dataset_integrity(str(folder), num_processes=1)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 3 and description["file_ending"] == FILE_ENDING[dim]


@pytest.mark.parametrize("dim", [2, 3])
def test_files_hold_the_rendered_images_masks_and_counterfactuals(tmp_path, dim):
    folder, ending = write(tmp_path, dim, train_scanners=("A", "B")), FILE_ENDING[dim]
    train = phantom_cases(3, 5, dim, SHAPE[dim], scanners=("A", "B"))
    test = phantom_cases(2, 5, dim, SHAPE[dim], test=True)
    for split, cases in (("Tr", train), ("Ts", test)):
        assert len(list((folder / f"images{split}").iterdir())) == len(cases)
        for case in cases:
            truth = render(case.patient, case.attributes.scanner, case.attributes.disease)
            image, spacing = read(folder / f"images{split}" / f"{case.name}_0000{ending}", dim)
            np.testing.assert_allclose(image / LEVELS[dim], truth.image, atol=0.51 / LEVELS[dim])
            np.testing.assert_array_equal(read(folder / f"labels{split}" / f"{case.name}{ending}", dim)[0], truth.mask)
            assert dim == 2 or tuple(spacing) == DEFAULT_SPACING[3]
            for name in INTERVENTIONS:
                expected = counterfactual(case.patient, case.attributes, name).image
                stored, _ = read(folder / "counterfactuals" / f"{case.name}__{name}_0000{ending}", dim)
                np.testing.assert_allclose(stored / LEVELS[dim], expected, atol=0.51 / LEVELS[dim])
    assert len(list((folder / "counterfactuals").iterdir())) == 5 * len(INTERVENTIONS)


def test_the_attribute_table_lists_training_and_test_cases(tmp_path):
    folder = write(tmp_path, patients=4, train_scanners=("B",))
    with open(folder / "attributes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "patient", "scanner", "disease"]
    assert [(r["scanner"], r["disease"]) for r in rows[:4]] == [("B", "none"), ("B", "effusion")] * 2
    assert [r["scanner"] for r in rows[4:]] == ["A", "B"]
    files = {p.name.removesuffix("_0000.png") for split in ("Tr", "Ts") for p in (folder / f"images{split}").iterdir()}
    assert {r["case"] for r in rows} == files and len({r["patient"] for r in rows}) == 6


def test_a_patient_does_not_depend_on_how_many_others_there_are_nor_on_the_scanners():
    few, many = phantom_cases(2, 7, shape=(32, 32), scanners=("A",)), phantom_cases(5, 7, shape=(32, 32))
    for a, b in zip(few, many, strict=False):
        assert a.name == b.name
        np.testing.assert_array_equal(render(a.patient, "A", "none").image, render(b.patient, "A", "none").image)
    test = phantom_cases(2, 7, shape=(32, 32), test=True)
    assert {c.patient.index for c in test}.isdisjoint(c.patient.index for c in many)


def test_every_combination_of_attributes_comes_equally_often():
    groups = [assign_attributes(i, ("A", "B")) for i in range(12)]
    assert sorted(groups.count(g) for g in set(groups)) == [3, 3, 3, 3]


def test_an_existing_dataset_is_kept_unless_overwriting_is_asked_for(tmp_path):
    folder = write(tmp_path, patients=3)
    before = (folder / "attributes.csv").read_text()
    with pytest.raises(UserError, match="already exists; fix: choose another number or name, or pass --overwrite"):
        write(tmp_path, patients=1)
    assert (folder / "attributes.csv").read_text() == before
    write(tmp_path, patients=1, overwrite=True)
    assert len(list((folder / "imagesTr").iterdir())) == 1
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_a_folder_that_the_phantom_did_not_write_is_never_overwritten(tmp_path):
    foreign = tmp_path / "Dataset902_Phantom"
    foreign.mkdir()
    (foreign / "dataset.json").write_text('{"labels": {}}')
    with pytest.raises(UserError, match="was not written by the phantom"):
        write(tmp_path, overwrite=True)
    assert (foreign / "dataset.json").exists()


def test_a_failure_half_way_leaves_no_dataset_under_its_name(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("nnunet_cfcl.phantom.dataset._write_tables", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert not list(tmp_path.glob("Dataset*"))
    monkeypatch.undo()
    assert (write(tmp_path) / "dataset.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_id": 1000}, "between 1 and 999"),
        ({"patients": 0}, "at least one training patient"),
        ({"train_scanners": ()}, "no scanner given"),
        ({"train_scanners": ("C",)}, "unknown scanner 'C'"),
        ({"dim": 5}, "2 or 3 dimensions"),
    ],
)
def test_wrong_arguments_are_rejected_before_anything_is_written(tmp_path, change, message):
    arguments = {"dataset_id": 9, "name": "P", "dim": 2, "patients": 1, "test_patients": 0, "seed": 0, **change}
    with pytest.raises(UserError, match=message):
        write_phantom_dataset(tmp_path, **arguments, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_dataset_number_in_use_is_rejected(tmp_path):
    (tmp_path / "Dataset902_Other").mkdir()
    words = "dataset number 902 is taken by .*Dataset902_Other; fix: choose another --dataset-id"
    with pytest.raises(UserError, match=words):
        write(tmp_path)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_contact_sheet_is_a_picture_with_a_row_per_case(tmp_path, dim):
    from skimage import io

    heights = []
    for count in (1, 2):
        path = contact_sheet(tmp_path / f"{count}.png", phantom_cases(count, 0, dim, SHAPE[dim]), dpi=40)
        picture = io.imread(path)[..., :3]
        heights.append(picture.shape[0])
        assert picture.std() > 20
    assert heights[1] == pytest.approx(2 * heights[0], abs=3)
    with pytest.raises(UserError, match="at least one case"):
        contact_sheet(tmp_path / "none.png", [])


def test_the_command_writes_a_dataset_with_its_contact_sheet(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_phantom_parser(parser.add_subparsers())
    counts = ["--patients", "2", "--test-patients", "1", "--shape", "24", "24"]
    arguments = parser.parse_args(["phantom", *counts, "--train-scanners", "A", "B", "--out", str(tmp_path)])
    assert arguments.run(arguments) == 0
    folder = tmp_path / "Dataset900_Phantom2D"
    assert (folder / "contact_sheet.png").exists() and len(list((folder / "imagesTr").iterdir())) == 2
    assert str(folder) in capsys.readouterr().out


def test_importing_the_command_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, nnunet_cfcl.phantom, nnunet_cfcl.cli.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
