"""Folders of masks, labels and attributes, and the errors of their readers."""

import json

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.masks.tables import CaseAttributes, find_labels, join_attributes, named_folders, read_folder
from nnunet_cfcl.nnunet.label_files import case_of


@pytest.mark.parametrize(("file", "case"), [
    ("a_1.nii.gz", "a_1"), ("a.b.nrrd", "a.b"), ("a.PNG", "a"), ("a.npz", None), ("dataset.json", None),
    ("._a.nii.gz", None), (".png", None),
])
def test_a_case_is_the_file_name_without_its_suffix(file, case):
    assert case_of(file) == case


def test_other_files_in_a_folder_of_predictions_are_ignored(tmp_path):
    for name in ("b.nii.gz", "a.nii.gz", "a.npz", "a.pkl", "plans.json", ".DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "chromap").mkdir()
    assert list(read_folder(tmp_path, "x").files) == ["a", "b"]


def test_missing_and_empty_folders_and_two_files_of_a_case_are_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder, expected a folder of masks.*; fix: correct the path"):
        read_folder(tmp_path / "nowhere", "x")
    with pytest.raises(UserError, match=r"has no masks, expected files of type .*\.nii\.gz"):
        read_folder(tmp_path, "x")
    (tmp_path / "a.nii.gz").touch(), (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match="more than one file for 1 cases: a; fix: keep one file per case"):
        read_folder(tmp_path, "x")


def test_methods_are_named_by_their_folders_or_by_a_given_name(tmp_path):
    (tmp_path / "b=c").mkdir()
    found = named_folders([f"{tmp_path}/a/", f"mine={tmp_path}/a", f"x={tmp_path}/b=c"])
    assert found == {"a": tmp_path / "a", "mine": tmp_path / "a", "x": tmp_path / "b=c"}
    # an existing folder is not split at its equals sign, but its own name is not valid
    with pytest.raises(UserError, match="'b=c', from .*, is not a valid name of a method"):
        named_folders([f"{tmp_path}/b=c"])


@pytest.mark.parametrize(("texts", "expected"), [
    (["x/validation", "y/Validation"], "two folders are named validation"),
    (["../evil=x"], "is not a valid name"), (["..=x"], "is not a valid name"), (["/"], "is not a valid name"),
    (["a/b=x"], "is not a valid name"),
])
def test_names_that_collide_or_leave_the_folder_are_errors(texts, expected):
    with pytest.raises(UserError, match=expected):
        named_folders(texts)


def test_labels_come_from_a_dataset_json_with_regions_as_plain_labels(tmp_path):
    assert find_labels(tmp_path / "labelsTr", tmp_path).names is None
    labels = {"background": 0, "whole": [1, 2, 3], "core": [3], "rim": 2, "ignore": 9}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    (tmp_path / "labelsTr").mkdir()
    for predictions in (tmp_path, tmp_path / "elsewhere"):
        found = find_labels(tmp_path / "labelsTr", predictions)
        assert (found.names, found.ignore, found.regions) == ({1: "", 2: "rim", 3: "core"}, 9, True)
    (tmp_path / "dataset.json").write_text('{"labels": 3}')
    with pytest.raises(UserError, match="the labels in .* cannot be read .*; fix: correct or remove the file"):
        find_labels(tmp_path / "labelsTr", tmp_path)


@pytest.fixture
def table(tmp_path):
    def write(text):
        file = tmp_path / "attributes.csv"
        file.write_text(text)
        return file

    return write


def test_attributes_are_joined_and_cases_without_a_row_are_unknown(table):
    joined = join_attributes(table("case,patient,scanner,disease\na,1,x,n\nb,1,?,n\nother,2,y,n\n"), "abc", ".png")
    assert joined.without_row == ("c",)
    assert joined.groupings(["scanner", "disease"], "abc") == {
        "all": {"all": ("a", "b", "c")}, "scanner": {"x": ("a",), "unknown": ("b", "c")},
        "disease": {"n": ("a", "b"), "unknown": ("c",)},
        "scanner x disease": {"x x n": ("a",), "unknown": ("b", "c")}}
    assert joined.patient("a") == joined.patient("b") != joined.patient("c")


def test_a_folder_is_read_as_its_attributes_csv(table):
    file = table("case,scanner\na,x\n")
    assert join_attributes(file.parent, "a", ".png").columns == {"scanner": {"a": "x"}}


@pytest.mark.parametrize(("text", "expected"), [
    ("name,scanner\na,x\n", "has the columns name, scanner, expected a column 'case'"),
    ("case,scanner,scanner\na,x,y\n", "column scanner occurs more than once"),
    ("case,dice\na,x\n", "column dice has the name of a column of metrics.csv"),
    ("case,scanner\na,x\na,y\nb\n,z\n",
     "3 faults: line 4 has 1 cells, expected 2, line 5 has no case, case a has more than one row"),
    ("case,scanner\na.png,x\n", "names of files"), ("case,scanner\n../../a,x\n", "names none of the 1 known cases"),
])
def test_the_error_lists_every_fault_of_the_table(table, text, expected):
    with pytest.raises(UserError, match=expected):
        join_attributes(table(text), "a", ".png")


def test_an_unknown_column_suggests_the_nearest_and_ages_are_not_groups():
    cases = [f"c{number}" for number in range(30)]
    columns = {"scanner": dict.fromkeys(cases, "x"), "age": {case: case for case in cases}}
    with pytest.raises(UserError, match="no column 'scaner' .* found scanner, age; fix: write --by scanner"):
        CaseAttributes(columns).groupings(["scaner"], cases)
    with pytest.raises(UserError, match="'age' has 30 different values in 30 cases, expected at most 20"):
        CaseAttributes(columns).groupings(["age"], cases)
    with pytest.raises(UserError, match="found none; fix: name the table with --attributes"):
        CaseAttributes().groupings(["scanner"], cases)
