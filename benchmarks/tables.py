"""Rows of text as an aligned table, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(header, rows, "simple")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(header, rows, "pipe")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    alignment = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt=style, colalign=alignment, disable_numparse=True)
