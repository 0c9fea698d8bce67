"""Guards the pages: every ```python block of README and docs/ runs, and what it asserts is so.

The blocks of a page run one after another in one namespace, as someone would who reads it from the top.
"""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text()
    namespace = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        lines_above = text[: block.start(1)].count("\n")  # so that a traceback shows the page's own line
        exec(compile("\n" * lines_above + block[1], str(page), "exec"), namespace)


def test_there_are_pages():
    assert ROOT / "README.md" in PAGES
