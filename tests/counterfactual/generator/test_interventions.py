"""Interventions: changed attributes and new values."""

from collections import Counter

import pytest
import torch

from nnunet_cfcl.counterfactual.generator.interventions import (
    Intervention,
    default_interventions,
    frequent_targets,
    named_interventions,
)
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.errors import UserError

SEX, SITE = Attribute("sex", "binary", ("F", "M")), Attribute("Site", "categorical", ("A", "B", "C"))
AGE, RARE = Attribute("age", "continuous", (), 50, 10), Attribute("tumour", "binary", ("no", "yes"))
CODING = AttributeCoding((SEX, AGE, RARE, SITE))


@pytest.fixture
def columns():
    """40 cases; 9 with a tumour, 5 of site C."""
    cases = [f"c{n}" for n in range(40)]
    return {"sex": {case: "FM"[n % 2] for n, case in enumerate(cases)},
            "Site": {case: "A" if n < 20 else "B" if n < 35 else "C" for n, case in enumerate(cases)},
            "tumour": {case: "yes" if n < 9 else "no" for n, case in enumerate(cases)},
            "age": {case: str(n) for n, case in enumerate(cases)}}


def test_by_default_attributes_with_enough_cases_change_alone_and_together_acquisition_first(columns):
    found = default_interventions(CODING, columns, list(columns["sex"]))
    assert [one.name for one in found] == ["Site", "sex", "Site+sex"]
    columns["tumour"]["c20"] = "yes"
    found = default_interventions(CODING, columns, list(columns["sex"]))
    assert [one.name for one in found] == ["Site", "sex", "tumour", "Site+sex+tumour"]


def test_only_the_given_cases_count_and_missing_cells_do_not(columns):
    first = [f"c{n}" for n in range(20)]  # all of site A
    assert [one.name for one in default_interventions(CODING, columns, first)] == ["sex"]
    columns["sex"].update(dict.fromkeys(first[1::2][:1], "NA"))
    assert default_interventions(CODING, columns, first) == ()


def test_the_new_value_is_each_other_one_equally_often():
    draws = [Intervention((SITE, SEX)).draw(torch.Generator().manual_seed(n), {"Site": "B", "sex": "M"})
             for n in range(600)]
    assert {draw["sex"] for draw in draws} == {"F"}
    counts = Counter(draw["Site"] for draw in draws)
    assert set(counts) == {"A", "C"} and abs(counts["A"] - 300) < 62  # 5 standard deviations


def test_an_unknown_value_may_become_any_and_the_draw_is_that_of_the_generator():
    values = {Intervention((SITE,)).draw(torch.Generator().manual_seed(n), {})["Site"] for n in range(50)}
    assert values == {"A", "B", "C"}
    one, other = (Intervention((SITE,)).draw(torch.Generator().manual_seed(7), {}) for _ in range(2))
    assert one == other


def test_interventions_are_found_by_their_names():
    found = named_interventions(["sex", "Site + sex"], CODING)
    assert found == (Intervention((SEX,)), Intervention((SITE, SEX)))
    assert found[1].name == "Site+sex"


def test_all_invalid_interventions_are_reported_at_once():
    with pytest.raises(UserError) as error:
        named_interventions(["site+age", "sex+sex", "tumour", "sex+Site", "Site+sex", "tumour"], CODING)
    message = str(error.value)
    for fault in ("'site' is not an attribute with at least two values (did you mean 'Site'?)",
                  "'age' is continuous", "'sex' is repeated in 'sex+sex'",
                  "'tumour' is listed more than once", "'Site+sex' is listed more than once"):
        assert fault in message, fault
    assert "counterfactual.interventions" in message


def test_no_case_is_changed_to_a_rare_value():
    vendor = Attribute("vendor", "categorical", ("GE", "Philips", "Toshiba"))
    cells = dict(enumerate(["GE"] * 30 + ["Philips"] * 20 + ["Toshiba"]))
    columns = {"vendor": {str(case): cell for case, cell in cells.items()}}
    (aimed,) = (frequent_targets(Intervention((vendor,)), columns, list(columns["vendor"])),)
    assert aimed.targets == (("GE", "Philips"),)
    generator = torch.Generator().manual_seed(0)
    assert {aimed.draw(generator, {"vendor": "GE"})["vendor"] for _ in range(20)} == {"Philips"}
    assert {aimed.draw(generator, {"vendor": "Toshiba"})["vendor"] for _ in range(40)} == {"GE", "Philips"}
    rare = {"vendor": {"a": "GE", "b": "Philips"}}
    assert frequent_targets(Intervention((vendor,)), rare, ["a", "b"]).targets == (vendor.values,)
