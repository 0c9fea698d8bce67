"""Guards docs/gpu.md on a real GPU, where the blocks that are for CUDA alone run (elsewhere: tests/test_pages.py)."""

from pathlib import Path

from blocks import run


def test_the_code_of_the_page_runs():
    run(Path(__file__).parents[2] / "docs" / "gpu.md")
