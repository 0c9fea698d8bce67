"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from .report import BEGIN, spliced


def count(text: str) -> int:
    """Return a number of things; an argument's type."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")


def check_page(parser: argparse.ArgumentParser, page: Path | None, begin: str = BEGIN, *, quick: bool = False) -> None:
    """End with a sentence where --markdown's page cannot take a report: said before the work, not after it."""
    if page is None:
        return
    if quick:
        parser.error("--quick is not for quoting: drop it, or --markdown")
    try:
        spliced(page.read_text(), "", begin)
    except (OSError, ValueError) as error:
        parser.error(f"--markdown {page}: {error}")


def write_page(page: Path, text: str, begin: str = BEGIN) -> None:
    """Put a report between the page's markers."""
    page.write_text(spliced(page.read_text(), text, begin))
