"""Kinds and encodings of attributes, in closed form."""

import json

import pytest
import torch

from nnunet_cfcl.data.attributes import Attribute, AttributeCoding, infer_attributes, is_missing
from nnunet_cfcl.errors import UserError


def table(**columns):
    """Columns given as lists of cells for the cases c0, c1, ..., and these cases."""
    cases = [f"c{n}" for n in range(max(len(cells) for cells in columns.values()))]
    return {name: dict(zip(cases, cells)) for name, cells in columns.items()}, cases


def kind_of(cells, declared=None):
    columns, cases = table(x=cells)
    coding, notes = infer_attributes(columns, cases, declared and {"x": declared})
    return coding.attributes[0].kind if coding.attributes else notes


@pytest.mark.parametrize(("cells", "kind"), [
    (["0", "1", "1", ""], "binary"), (["A", "B"], "binary"), (["1.5", "3"], "binary"),
    (["A", "B", "C"] * 4, "categorical"), (["1", "2", "A"] * 4, "categorical"),
    (["1", "2", "3"] * 5, "categorical"), (["1", "2", "3"] * 4, "continuous"), (["1.5", "2", "3"] * 20, "continuous"),
    ([str(n) for n in range(11)] * 9, "continuous"), (["-3e-2", "7", "0.25", "NA"], "continuous")])
def test_the_kind_is_inferred_from_the_cells(cells, kind):
    assert kind_of(cells) == kind


def test_a_declared_kind_takes_precedence():
    assert kind_of(["1", "2", "3"], "categorical") == "categorical"
    assert kind_of(["1", "2"], "continuous") == "continuous"
    assert kind_of(["0", "1"], "categorical") == "categorical"
    assert "declared 'ignore'" in kind_of(["A", "B"], "ignore")[0]


@pytest.mark.parametrize(("cells", "reason"), [
    (["A", "A", ""], "its only value is 'A'"), (["", "NaN", "unknown"], "it has no values"),
    (["x1", "x2", "x3", "x4", "x4"], "4 of 5 values are different texts")])
def test_a_column_without_information_is_not_an_attribute_and_is_reported(cells, reason):
    notes = kind_of(cells)
    assert len(notes) == 1 and "column 'x' is not used" in notes[0] and reason in notes[0]


def test_all_wrong_declarations_are_listed_in_one_error():
    columns, cases = table(site=["A", "B", "C"], dose=["1", "two", "3"], one=["A", "A", "A"], same=["1", "1.0", "1"])
    declared = {"sight": "binary", "site": "binary", "dose": "continuous", "one": "categorical", "same": "continuous"}
    with pytest.raises(UserError) as error:
        infer_attributes(columns, cases, {**declared, "age": "number"})
    message = str(error.value)
    assert "7 errors" in message
    for reason in ("'sight' is not a column of attributes.csv (found site, dose, one, same)", "'age' is not a column",
                 "'age' cannot be 'number', expected one of binary, categorical, continuous, ignore",
                 "'site' cannot be binary: it has 3 values (A, B, C)",
                 "'dose' cannot be continuous: it has cells that are not numbers (two)",
                 "'one' cannot be categorical: its only value is 'A'",
                 "'same' cannot be continuous: all its numbers are equal"):
        assert reason in message, reason


def test_values_and_statistics_are_computed_on_the_given_cases_alone():
    columns, cases = table(age=["1.5", "2", "4.5", "1000"], site=["b", "a", "c", "d"])
    coding, _ = infer_attributes(columns, cases[:3], {"site": "categorical"})
    age, site = coding.attributes
    assert age.mean == pytest.approx(8 / 3) and age.std == pytest.approx(((49 + 16 + 121) / 108) ** 0.5)
    assert site.values == ("a", "b", "c")
    with pytest.raises(UserError, match="'site' has the values a, b, c, found 'd'"):
        site.encode("d")


def test_numbers_among_the_values_are_sorted_as_numbers():
    columns, cases = table(x=["10", "9", "high", "-1"])
    coding, _ = infer_attributes(columns, cases, {"x": "categorical"})
    assert coding.attributes[0].values == ("-1", "9", "10", "high")


def test_the_encoding_is_one_hot_or_standardised_and_ends_with_unknown():
    coding = AttributeCoding((Attribute("s", "binary", ("A", "B")), Attribute("d", "categorical", ("x", "y", "z")),
                              Attribute("age", "continuous", (), 50.0, 10.0)))
    assert coding.width == 2 + 4 + 2
    assert coding.encode({"age": "65", "s": "B", "d": "y"}).tolist() == [1, 0, 0, 1, 0, 0, 1.5, 0]
    assert coding.encode({"s": "A"}).tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert coding.encode({"s": "n/a"}).tolist() == [0, 1, 0, 0, 0, 1, 0, 1]
    assert coding.encode({}).dtype == torch.float32


def test_different_numbers_have_different_encodings_with_mean_0_and_variance_1():
    cells = [f"{n * n}" for n in range(20)]
    columns, cases = table(x=cells)
    attribute = infer_attributes(columns, cases)[0].attributes[0]
    encoded = torch.stack([attribute.encode(cell) for cell in cells])
    assert len({tuple(row) for row in encoded.tolist()}) == 20
    assert encoded[:, 0].mean().abs() < 1e-6 and encoded[:, 0].var(correction=0) == pytest.approx(1, abs=1e-5)


def test_text_in_a_continuous_attribute_is_an_error_that_names_the_declaration_to_add():
    with pytest.raises(UserError, match=r"'age' is continuous, found 'old'; "
                                        r"fix: write a number, or declare .*attributes\.json"):
        Attribute("age", "continuous").encode("old")


def test_a_coding_survives_a_round_trip_through_json():
    columns, cases = table(age=["1", "2.5", "4"] * 5, site=["A", "B", "C"] * 5, sex=["F", "M"] * 8)
    coding, _ = infer_attributes(columns, cases)
    assert AttributeCoding.from_json(json.loads(json.dumps(coding.to_json()))) == coding


@pytest.mark.parametrize(("cell", "missing"), [("", True), (" NA ", True), ("Unknown", True), ("?", True), ("0", False),
                                               ("no", False), ("N", False)])
def test_cells_that_count_as_missing(cell, missing):
    assert is_missing(cell) == missing
