"""The ```python blocks of a page, to run in the order in which they stand there."""

import re

import torch

PROCESSES = "<!-- run: 2 processes -->\n"  # above a block that is to run in each of two
BLOCK = re.compile(rf"^({PROCESSES})?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page, processes=False):
    """The page's blocks of either kind, each below as many empty lines as a traceback needs to show the page's own."""
    text = page.read_text()
    found = [block for block in BLOCK.finditer(text) if bool(block[1]) == processes]
    return ["\n" * text[: block.start(2)].count("\n") + block[2] for block in found]


def run(page, processes=False):
    """Run the blocks one after another in one namespace, as someone would who reads the page from the top."""
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    for block in blocks_of(page, processes):
        exec(compile(block, str(page), "exec"), namespace)
