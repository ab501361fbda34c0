"""The page of versions and features says what was measured and what is tested."""

import re

import pytest

from nnunet_cfcl.nnunet.compatibility import NNUNET_VERSIONS
from tests.compatibility.environments import CHECKOUT
from tests.compatibility.features import FEATURES
from tests.compatibility.page import PAGE, measured_versions, page_text, version_numbers, versions_table


def test_the_tables_of_the_page_are_those_that_would_be_made_now():
    text = PAGE.read_text(encoding="utf-8")
    assert page_text(text) == text, "run: python -m tests.compatibility.page"


@pytest.mark.parametrize("test", sorted({test for feature in FEATURES for test in feature.tests}))
def test_a_test_that_the_page_names_exists(test):
    file, name = test.split("::")
    assert re.search(rf"^def {name}\(", (CHECKOUT / "tests" / file).read_text(), re.MULTILINE)


def test_the_requirement_of_the_package_is_what_the_doctor_supports():
    low, high = (".".join(map(str, version)) for version in NNUNET_VERSIONS)
    assert f'"nnunetv2>={low},<{high}"' in (CHECKOUT / "pyproject.toml").read_text()


def test_of_the_measured_versions_exactly_those_that_pass_every_step_are_supported():
    for version, found in measured_versions()["versions"].items():
        supported = NNUNET_VERSIONS[0] <= version_numbers(version) < NNUNET_VERSIONS[1]
        assert supported == (set(found["steps"].values()) == {"ok"}), version


def test_a_version_that_stops_at_a_step_says_why_and_leaves_the_cells_after_it_empty():
    table = versions_table({"python": "3.11", "torch": "2.9", "versions": {
        "2.6.0": {"steps": {"import": "a | b"}, "notes": ["old"]},
        "2.10.0": {"steps": {"import": "ok", "train": "ok"}, "notes": []}}})
    assert table.splitlines()[2:4] == ["| 2.10.0 | ok | ok |  |", "| 2.6.0 | **fails**: a / b |  | old |"]
