"""Guards docs/ecosystem.md: every row of its table names tests, and each of them is where the page says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"
LINK = re.compile(r"\[`(test_\w+)`\]\((\.\./tests/[\w/]+\.py)\)")
TEXT = PAGE.read_text()
ROWS = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("|")][2:]


@pytest.mark.parametrize(("name", "path"), sorted(set(LINK.findall(TEXT))))
def test_a_test_that_the_page_names_is_there(name, path):
    assert re.search(rf"^def {name}\(", (PAGE.parent / path).read_text(), re.MULTILINE)


def test_every_row_has_a_test():
    tools = 0
    for tool, behaviour, shown_by in ROWS:
        if tool.strip().startswith("**"):  # the name of a group of rows
            assert not (behaviour + shown_by).strip()
        else:
            assert behaviour.strip()
            assert LINK.sub("", shown_by).strip(" ,") == "", tool
            assert LINK.search(shown_by), tool
            tools += 1
    assert tools > 30


def test_the_page_names_no_test_without_its_file():
    assert "test_" not in LINK.sub("", TEXT)
