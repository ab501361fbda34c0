"""attributes.csv and attributes.json as users write them; faulty rows are tested in test_patients.py."""

import csv

import pytest

from nnunet_cfcl.data.attribute_table import read_attribute_table, read_declared_kinds
from nnunet_cfcl.data.attributes import infer_attributes
from nnunet_cfcl.errors import UserError


def test_neither_the_patient_column_nor_unnamed_columns_are_attributes(tmp_path):
    (tmp_path / "attributes.csv").write_text("patient,age,case,,\np1,60,c1,,\np1,,c2,,\n")
    table = read_attribute_table(tmp_path)
    assert table.cases == ("c1", "c2")
    assert table.columns == {"patient": ("p1", "p1"), "age": ("60", "")}
    assert table.attributes == {"age": {"c1": "60", "c2": ""}}


def test_without_the_files_there_is_no_table_and_no_declaration(tmp_path):
    assert read_attribute_table(tmp_path) is None and read_declared_kinds(tmp_path) == {}


def test_declarations_are_read(tmp_path):
    (tmp_path / "attributes.json").write_text('{"site": "categorical"}')
    assert read_declared_kinds(tmp_path) == {"site": "categorical"}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"age": {"type": "continuous"}}', '{"age": 1}'])
def test_any_other_json_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "attributes.json").write_text(text)
    with pytest.raises(UserError, match=r"attributes\.json .*fix: correct or remove it"):
        read_declared_kinds(tmp_path)


def test_the_kinds_inferred_for_the_chest_x_rays_are_the_expected_ones(tmp_path, real_images):
    with open(real_images / "cxr" / "meta.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = {"case_id": "case", "patient_id": "patient"}
    header = [names.get(name, name) for name in rows[0]]
    (tmp_path / "attributes.csv").write_text("\n".join(",".join(row) for row in [header, *(r.values() for r in rows)]))
    table = read_attribute_table(tmp_path)
    coding, notes = infer_attributes(table.attributes, table.cases)
    assert {one.name: one.kind for one in coding.attributes} == {
        "source": "binary", "scanner": "binary", "disease": "binary", "sex": "binary", "age": "continuous"}
    assert notes == []
    age = next(one for one in coding.attributes if one.name == "age")
    assert 30 < age.mean < 50 and 10 < age.std < 20
