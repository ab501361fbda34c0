"""The reference pages hold what the code says."""

import importlib
import json
import os
import re
from dataclasses import fields, make_dataclass
from typing import Literal, get_type_hints

import pytest

from docs import generate_reference as reference
from nnunet_cfcl.cli import VERBS, main
from nnunet_cfcl.config import settings_keys, settings_table
from nnunet_cfcl.config.checks import setting

STALE = "the page is not what the code says: run `make docs`"


def words(text: str) -> list[str]:
    """What is left where Python's versions break lines of a help differently."""
    return text.split()


@pytest.mark.parametrize("name", reference.BLOCKS)
def test_what_a_page_takes_from_the_code_is_up_to_date(name):
    page = reference.PAGES / name
    assert words(reference.regenerated(page)) == words(page.read_text(encoding="utf-8")), STALE


def test_every_setting_is_in_the_table_with_its_default_and_meaning():
    table = reference.settings_sections()
    for key, default, meaning in settings_keys():
        row, = [line for line in table.splitlines() if line.startswith(f"| `{key}` |")]
        assert row.startswith(f"| `{key}` | {meaning} | `{json.dumps(default)}` | ")


def test_the_verb_prints_all_settings_in_one_table(capsys):
    assert main(["settings"]) == 0
    assert capsys.readouterr().out.strip() == settings_table()


@pytest.mark.parametrize(("hint", "low", "high", "expected"), [
    (int, 1, None, "integer, at least 1"), (float, None, 2, "number, at most 2"),
    (float, 1e-4, 0.5, "number, 0.0001 to 0.5"), (bool, None, None, "true or false"),
    (int | None, 1, None, "integer, at least 1, or null"),
    (bool | str | None, None, None, "true or false, or text, or null"),
    (Literal["a", "b"], None, None, '`"a"` or `"b"`'), (tuple[float, float], 0, 1, "[low, high], 0 to 1"),
    (tuple[int, ...] | None, 0, 2, "list of integers, 0 to 2, or null"),
])
def test_what_a_setting_accepts_is_said_in_words(hint, low, high, expected):
    group = make_dataclass("Group", [("one", hint, setting(None, "", low, high))])
    assert reference.accepted(get_type_hints(group)["one"], fields(group)[0]) == expected


def test_every_verb_and_every_part_of_one_has_its_help():
    titles = [line[4:] for line in reference.command_helps().splitlines() if line.startswith("### ")]
    assert [title for title in titles if title.count(" ") == 1] == [f"nnunet_cfcl {verb}" for verb in VERBS]
    parts = ["counterfactuals import", "generator train", "generator generate", "attributes discover"]
    assert {"nnunet_cfcl", "python -m nnunet_cfcl.pretrain", *(f"nnunet_cfcl {part}" for part in parts)} <= set(titles)


def test_the_help_does_not_depend_on_the_terminal(monkeypatch):
    shown = set()
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        shown.add(reference.command_helps())
        assert os.environ["COLUMNS"] == columns
    text, = shown
    assert 90 < max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("text", ["", "<!-- a: x -->\n\n1\n\n<!-- end of a -->\n" * 2])
def test_a_page_without_the_markers_or_with_several_is_refused(text):
    with pytest.raises(ValueError, match="'a', expected one"):
        reference.with_block(text, "a", "2")


def test_only_what_lies_between_the_markers_is_replaced():
    text = "before\n<!-- a: x -->\n\n1 \\1\n\n<!-- end of a -->\nafter"
    assert reference.with_block(text, "a", r"2 \1") == text.replace("1 \\1", "2 \\1")


def test_every_name_that_a_room_exports_has_a_line_on_the_python_page():
    listed = reference.public_names()
    for room in ("losses", "views", "trainers"):
        module = importlib.import_module(f"nnunet_cfcl.{room}")
        section = listed.partition(f"### nnunet_cfcl.{room}\n")[2].partition("\n### ")[0]
        assert all(re.search(rf"^- `{name}\b", section, re.MULTILINE) for name in module.__all__), room


@pytest.mark.parametrize(("documentation", "expected"), [
    ("Draw points, for i = 1 .. V - 1. Others stay.", "Draw points, for i = 1 .. V - 1."),
    ("Log-sum-exp of :math:`S`\nin ``float32`` (method section 2).\n\nArgs:", "Log-sum-exp of `S` in `float32`."),
    ("Check a spacing, e.g. The plan's. Raise for `a < b`.", "Check a spacing, e.g. The plan's."),
    ("Return c < d of `a < b`", "Return c &lt; d of `a < b`"), ("", ""),
])
def test_a_name_is_described_by_the_first_sentence_of_its_docstring(documentation, expected):
    assert reference.first_sentence(documentation) == expected
