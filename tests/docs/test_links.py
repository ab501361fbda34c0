"""Links of the README and the documentation lead somewhere, on a code host as on the disk."""

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, inline_code, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading_that_are_there(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_pages_of_the_documentation_link_to_nothing_outside_of_it():
    outside = [(str(page), target) for page in PAGES[1:] for target in links(page)
               if target.partition("#")[0]
               and not (page.parent / target.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")]
    assert not outside


def test_readme_and_first_page_link_to_every_page_but_those_of_single_results():
    front_doors = (PAGES[0], ROOT / "docs" / "index.md")
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in front_doors for target in links(page)}
    own = {front_doors[1], *(ROOT / "docs" / "results").glob("*.md")}
    assert not [page for page in PAGES[1:] if page not in linked | own]


def test_the_readme_has_at_most_600_words():
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= 600


def test_every_path_that_the_architecture_page_names_exists():
    paths = {code for code in inline_code(ROOT / "docs" / "architecture.md") if code.startswith("nnunet_cfcl/")}
    assert len(paths) > 20 and not [path for path in paths if not (ROOT / path).exists()]
