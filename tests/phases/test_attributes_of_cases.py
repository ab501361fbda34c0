"""What is known of the cases: the table or its copy, what is learned and changed, and what a user is told."""

import json
from pathlib import Path

import pytest

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.phases import attributes_of_cases
from nnunet_cfcl.phases.attributes_of_cases import (
    STORED,
    KnownAttributes,
    NothingToChange,
    coding_and_interventions,
    known_attributes,
)

DATASET = "Dataset007_Toy"
TABLE = "case,scanner,patient,age\ntoy_0,A,p0,50\ntoy_1,B,p0,61.5\n"
COLUMNS = {"scanner": {"toy_0": "A", "toy_1": "B"}, "age": {"toy_0": "50", "toy_1": "61.5"}}


@pytest.fixture
def raw(toy) -> Path:
    return toy / "nnUNet_raw" / DATASET


@pytest.fixture
def preprocessed(toy) -> Path:
    return toy / "nnUNet_preprocessed" / DATASET


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A function after which the raw dataset is out of reach, by the variable or by the folder."""

    def make(how: str) -> None:
        if how == "unset":
            monkeypatch.delenv("nnUNet_raw")
        else:
            monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nowhere"))

    return make


# ---------------------------------------------------------------- the table and its copy


def test_without_a_table_nothing_is_known_and_nothing_is_written(preprocessed):
    assert known_attributes(preprocessed) is None
    assert not (preprocessed / STORED).exists()


def test_the_table_is_read_without_the_patients_and_a_copy_is_kept(raw, preprocessed):
    (raw / "attributes.csv").write_text(TABLE)
    (raw / "attributes.json").write_text('{"age": "continuous"}')
    known = known_attributes(preprocessed)
    assert known.columns == COLUMNS and known.declared == {"age": "continuous"}
    assert known.table == str(raw / "attributes.csv")
    assert json.loads((preprocessed / STORED).read_text())["columns"] == COLUMNS


@pytest.mark.parametrize("how", ["unset", "no folder"])
def test_a_training_without_the_raw_dataset_reads_the_copy(raw, preprocessed, elsewhere, how):
    (raw / "attributes.csv").write_text(TABLE)
    (raw / "attributes.json").write_text('{"age": "continuous"}')
    here = known_attributes(preprocessed)
    elsewhere(how)
    there = known_attributes(preprocessed)
    assert (there.columns, there.declared) == (here.columns, here.declared)
    assert STORED in there.table and "copy of attributes.csv" in there.table


@pytest.mark.parametrize("how", ["unset", "no folder"])
def test_without_the_raw_dataset_and_without_a_copy_nothing_is_known(preprocessed, elsewhere, how):
    elsewhere(how)
    assert known_attributes(preprocessed) is None


def test_a_table_that_was_taken_away_is_not_known_from_its_copy(raw, preprocessed):
    (raw / "attributes.csv").write_text(TABLE)
    known_attributes(preprocessed)
    (raw / "attributes.csv").unlink()
    assert known_attributes(preprocessed) is None


def test_the_copy_follows_the_table_and_is_left_alone_where_nothing_changed(raw, preprocessed):
    (raw / "attributes.csv").write_text(TABLE)
    known_attributes(preprocessed)
    written = (preprocessed / STORED).stat().st_mtime_ns
    known_attributes(preprocessed)
    assert (preprocessed / STORED).stat().st_mtime_ns == written
    (raw / "attributes.csv").write_text(TABLE.replace("toy_1,B", "toy_1,C"))
    known_attributes(preprocessed)
    assert json.loads((preprocessed / STORED).read_text())["columns"]["scanner"]["toy_1"] == "C"


def test_a_copy_in_another_encoding_is_replaced(raw, preprocessed):
    (raw / "attributes.csv").write_text(TABLE)
    (preprocessed / STORED).write_bytes(b"\xff\xfe")
    known_attributes(preprocessed)
    assert json.loads((preprocessed / STORED).read_text())["columns"] == COLUMNS


def test_where_no_copy_can_be_written_the_table_is_used_all_the_same(raw, preprocessed, monkeypatch):
    (raw / "attributes.csv").write_text(TABLE)

    def refuse(file, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(attributes_of_cases, "write_text_atomically", refuse)
    assert known_attributes(preprocessed).columns == COLUMNS


def test_a_dataset_that_is_not_preprocessed_gets_no_copy(raw, preprocessed):
    (raw / "attributes.csv").write_text(TABLE)
    for file in (preprocessed / "nnUNetPlans_2d").iterdir():
        file.unlink()
    (preprocessed / "nnUNetPlans_2d").rmdir()
    for file in preprocessed.iterdir():
        file.unlink()
    preprocessed.rmdir()
    assert known_attributes(preprocessed).columns == COLUMNS and not preprocessed.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "columns": {}, "declared": {}}', '{"format": 1}'])
def test_a_copy_that_cannot_be_read_is_named_with_what_mends_it(preprocessed, elsewhere, content):
    elsewhere("unset")
    (preprocessed / STORED).write_text(content)
    with pytest.raises(UserError, match=rf"{STORED} is not a readable copy.*delete it.*generator train"):
        known_attributes(preprocessed)


def test_the_cells_of_a_case_are_those_of_its_row():
    known = KnownAttributes({**COLUMNS, "disease": {"toy_1": "yes"}}, {}, "table")
    assert known.cells(["toy_1", "toy_0", "toy_9"]) == {
        "toy_1": {"scanner": "B", "age": "61.5", "disease": "yes"}, "toy_0": {"scanner": "A", "age": "50"},
        "toy_9": {}}


# ---------------------------------------------------------------- what is learned and changed

CASES = [f"c{n:02d}" for n in range(40)]


def table(**columns: list[str]) -> KnownAttributes:
    return KnownAttributes({name: dict(zip(CASES, cells)) for name, cells in columns.items()}, {}, "attributes.csv")


SCANNER, SEX = ["A", "B"] * 20, ["F", "F", "M", "M"] * 10


def choose(known, wanted=None, cases=CASES, all_cases=CASES):
    lines: list[str] = []
    return *coding_and_interventions(known, cases, all_cases, ".nii.gz", wanted, lines.append), lines


def test_every_attribute_is_known_and_each_with_enough_cases_is_changed_alone_and_together():
    coding, interventions, lines = choose(table(scanner=SCANNER, sex=SEX, age=[str(n + 0.5) for n in range(40)]))
    assert [one.name for one in coding.attributes] == ["scanner", "sex", "age"]
    assert [one.name for one in interventions] == ["scanner", "sex", "scanner+sex"] and not lines


def test_what_is_wanted_is_changed_and_nothing_else():
    _, interventions, _ = choose(table(scanner=SCANNER, sex=SEX), ["sex"])
    assert [one.name for one in interventions] == ["sex"]


def test_a_declaration_reaches_the_coding():
    known = KnownAttributes(table(site=["1", "2", "3", "4"] * 10).columns, {"site": "continuous"}, "attributes.csv")
    with pytest.raises(NothingToChange):
        choose(known)
    assert choose(table(site=["1", "2", "3", "4"] * 10))[0].attributes[0].kind == "categorical"


def test_rows_of_other_cases_are_said_and_not_learned_from():
    known = table(scanner=SCANNER)
    known.columns["scanner"].update(test_1="C", test_2="C")
    coding, _, lines = choose(known)
    assert coding.attributes[0].values == ("A", "B")
    assert len(lines) == 1 and "rows of 2 cases that are neither in the dataset nor in its pool" in lines[0]
    assert "test_1, test_2" in lines[0]


def test_cases_that_are_not_used_are_no_strangers_and_are_not_learned_from():
    known = table(scanner=[*SCANNER[:30], *["C"] * 10])
    coding, _, lines = choose(known, cases=CASES[:30])
    assert coding.attributes[0].values == ("A", "B") and not lines


def test_a_table_of_no_known_case_is_refused_with_examples_of_both():
    known = KnownAttributes({"scanner": {"x1": "A", "x2": "B"}}, {}, "attributes.csv")
    with pytest.raises(UserError, match=r"names none of the 40 known cases, such as c00, but 2 others: x1, x2"):
        choose(known)


def test_a_table_of_files_is_refused_with_how_to_write_cases():
    known = table(scanner=SCANNER)
    known.columns["scanner"]["c00_0000.nii.gz"] = known.columns["scanner"].pop("c00")
    with pytest.raises(UserError, match=r"1 names of files .*c00_0000\.nii\.gz; fix: write them without _0000"):
        choose(known)


def test_a_column_with_one_value_is_said_and_without_another_nothing_can_be_changed():
    _, interventions, lines = choose(table(scanner=SCANNER, vendor=["X"] * 40))
    assert [one.name for one in interventions] == ["scanner"]
    assert lines == ["attributes.csv: column 'vendor' is not used: its only value is 'X'"]
    with pytest.raises(NothingToChange, match=r"no attribute of attributes\.csv can be interv.*no attribute with two"):
        choose(table(vendor=["X"] * 40))
    with pytest.raises(UserError, match=r"'vendor' is not an attribute with at least two.*counterfactual.interv"):
        choose(table(scanner=SCANNER, vendor=["X"] * 40), ["vendor"])


def test_too_few_cases_of_every_value_are_counted_in_the_message():
    with pytest.raises(NothingToChange) as error:
        choose(table(scanner=["B"] * 9 + ["A"] * 31, age=[str(n + 0.5) for n in range(40)]))
    message = str(error.value)
    for said in ("two of whose values have 10 cases each", "scanner is binary with A: 31, B: 9", "age is continuous",
                 "name counterfactual.interventions", "counterfactual.source to acquisition", "attributes.json"):
        assert said in message, said


def test_a_continuous_attribute_cannot_be_flipped():
    known = table(scanner=SCANNER, age=[str(n + 0.5) for n in range(40)])
    with pytest.raises(UserError, match=r"'age' is continuous; only binary and categorical attributes can be changed"):
        choose(known, ["scanner", "age"])


@pytest.mark.parametrize(("known", "fine"), [(40, True), (20, True), (19, False)])
def test_at_least_half_of_the_cases_must_have_a_value_of_what_is_changed(known, fine):
    cells = SCANNER[:known] + ["", "NA"] * (20 - known // 2)
    table_ = table(scanner=cells[:40], sex=SEX)
    if not fine:
        with pytest.raises(UserError) as error:
            choose(table_, ["scanner"])
        message = str(error.value)
        for said in ("has no value of 'scanner' for 21 of 40 cases: c19, c20", "fill in these rows",
                     "at least half of the cases need a value", "counterfactual.interventions"):
            assert said in message, said
        assert choose(table_, ["sex"])[2] == []  # what is not changed may be unknown
    else:
        lines = choose(table_, ["scanner"])[2]
        assert [f"for {40 - known} of 40 cases" in line for line in lines] == [True] * (known < 40)


def test_cases_without_a_row_count_as_unknown():
    known = table(scanner=SCANNER)
    for case in CASES[:5]:
        del known.columns["scanner"][case]
    assert "for 5 of 40 cases, which count as unknown: c00, c01" in choose(known)[2][0]


def test_a_table_with_cases_alone_can_change_nothing():
    with pytest.raises(NothingToChange, match="it has no attribute with two values"):
        choose(KnownAttributes({}, {}, "attributes.csv"))
