"""Patients of the cases, read from users' tables and from the stored copy."""

import pytest

from nnunet_cfcl.data.patients import Patients, known_patients, read_patients, store_patients
from nnunet_cfcl.errors import UserError


@pytest.fixture
def table(tmp_path):
    """A function that writes attributes.csv, text or bytes, and returns its folder."""

    def write(content):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "attributes.csv").write_bytes(content)
        return tmp_path

    return write


def test_patients_are_read_for_any_order_and_any_other_columns(table):
    folder = table("scanner,patient,case\nA,p1,c1\nB,p1,c2\nB,p2,c3\n")
    assert read_patients(folder) == {"c1": "p1", "c2": "p1", "c3": "p2"}


@pytest.mark.parametrize(
    "content",
    ["case,patient\nc1,p1\nc2,p2\n".encode("utf-8-sig"), "case, patient\r\n c1 ,p1 \r\n\r\nc2,p2\r\n",
     'case,patient,note\nc1,p1,"a, b"\nc2,p2,"two\nlines"\n,,\n'])
def test_a_table_as_spreadsheets_write_it_is_read(table, content):
    assert read_patients(table(content)) == {"c1": "p1", "c2": "p2"}


def test_without_a_table_or_its_column_no_patient_is_known(tmp_path, table):
    assert read_patients(tmp_path) is None
    assert read_patients(table("case,scanner\nc1,A\n")) is None
    assert read_patients(table("case,patient\nc1,\nc2,NA\nc3,unknown\n")) == {}


def test_a_case_without_a_patient_counts_as_its_own_patient(table):
    patients = read_patients(table("case,patient\nc1,p1\nc2,\n"))
    assert patients == {"c1": "p1"}
    assert [Patients(patients, "").of(case) for case in ("c1", "c2", "c3")] == ["p1", "c2", "c3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "found the columns none"),
     ("case;patient\nc1;p1\n", "one column 'case', found the columns case;patient"),
     ("id,patient\nc1,p1\n", "one column 'case', found the columns id, patient"),
     ("case,patient,patient\nc1,p1,p2\n", "duplicate columns: 'patient'"),
     ("case,patient\nMüller,p1\n".encode("latin-1"), "UTF-8"),
     ("case,patient\nc1,p1\n".encode("utf-16"), "UTF-8"),
     ('case,patient\nc1,"p1\n', "comma-separated")])
def test_a_file_that_is_not_a_table_of_cases_is_an_error_that_names_it(table, content, said):
    with pytest.raises(UserError, match=said) as error:
        read_patients(table(content))
    assert "attributes.csv" in str(error.value)


def test_a_folder_in_place_of_the_table_is_an_error(tmp_path):
    (tmp_path / "attributes.csv").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_patients(tmp_path)


def test_all_faulty_rows_are_listed_in_one_error(table):
    folder = table("case,patient\nc1,p1\nc2\nc1,p2\n,p3\nc3,p4,x\nc4,p5\nc4,p5\n")
    with pytest.raises(UserError) as error:
        read_patients(folder)
    message = str(error.value)
    assert "5 errors" in message
    for fault in ("line 3 has 1 cells, expected 2", "line 6 has 3 cells", "line 5 has no case",
                  "case c1 has more than one row", "case c4 has more than one row"):
        assert fault in message


def test_of_many_errors_the_first_ten_are_listed(table):
    rows = "".join(f"c{n}\n" for n in range(25))
    with pytest.raises(UserError, match="25 errors: line 2 has.*line 11 has 1 cells, expected 2 and 15 more;"):
        read_patients(table("case,patient\n" + rows))


# --- the copy beside the preprocessed data


@pytest.fixture
def preprocessed(tmp_path):
    folder = tmp_path / "Dataset007_Toy"
    folder.mkdir()
    return folder


def test_the_raw_table_is_used_where_there_is_one_and_the_stored_copy_elsewhere(tmp_path, table, preprocessed):
    raw = table("case,patient\nc1,p1\nc2,\n")
    store_patients(preprocessed, read_patients(raw))
    known = known_patients(raw, preprocessed)
    assert (known.names, known.outdated) == ({"c1": "p1"}, False)
    assert known.table == "the column 'patient' of nnUNet_raw/Dataset007_Toy/attributes.csv"
    for elsewhere in (None, tmp_path / "not there"):
        known = known_patients(elsewhere, preprocessed)
        assert (known.names, known.outdated) == ({"c1": "p1"}, False)
        assert "cfcl_patients.json" in known.table


@pytest.mark.parametrize("stored", [{"c1": "p2"}, {"c1": "p1", "c2": "p1"}, {}, None])
def test_a_raw_table_that_differs_from_the_copy_takes_precedence_and_outdates_it(table, preprocessed, stored):
    store_patients(preprocessed, stored)
    known = known_patients(table("case,patient\nc1,p1\n"), preprocessed)
    assert known.names == {"c1": "p1"} and known.outdated


def test_a_raw_table_alone_is_not_outdated_and_without_either_no_patient_is_known(tmp_path, table, preprocessed):
    assert known_patients(None, preprocessed) == Patients({}, "")
    store_patients(preprocessed, None)
    assert known_patients(None, preprocessed) == Patients({}, "")
    (preprocessed / "cfcl_patients.json").unlink()
    assert not known_patients(table("case,patient\nc1,p1\n"), preprocessed).outdated


def test_a_raw_dataset_whose_table_is_gone_or_names_no_patients_does_not_hide_the_copy(table, preprocessed, tmp_path):
    store_patients(preprocessed, {"c1": "p1"})
    assert known_patients(tmp_path, preprocessed).names == {"c1": "p1"}
    assert known_patients(table("case,scanner\nc1,A\n"), preprocessed).names == {"c1": "p1"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "patients": {}}', '{"format": 1, "patients": [1]}'])
def test_a_broken_copy_is_an_error_that_names_the_file_to_delete(preprocessed, text):
    (preprocessed / "cfcl_patients.json").write_text(text)
    with pytest.raises(UserError, match=r"cfcl_patients\.json is not a readable list .*delete it and run nnunet"):
        known_patients(None, preprocessed)
