"""The page of faults says what is tried."""

import re

import pytest

from tests.faults.page import PAGE, ROOT, page_text
from tests.faults.tried import FAULTS
from tests.pretraining.unusual_inputs import INPUTS


def test_the_tables_of_the_page_are_those_that_would_be_made_now():
    text = PAGE.read_text(encoding="utf-8")
    assert page_text(text) == text, "run: python -m tests.faults.page"


def test_every_unusual_image_has_a_row():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.search(r"<!-- inputs: .*? -->\n\n(.*)\n\n<!-- end of inputs -->", text, re.DOTALL)[1].splitlines()[2:-2]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [one.name for one in INPUTS], (
        "run: python -m tests.faults.page --inputs")


@pytest.mark.parametrize("test", sorted({test for fault in FAULTS for test in fault.tests}))
def test_a_test_that_the_page_names_exists(test):
    file, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
