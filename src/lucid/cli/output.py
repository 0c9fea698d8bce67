"""Output of the commands: tables for people, JSON for programs."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .error import CommandError

_PIPED_WIDTH = 200  # in a pipe, columns are not squeezed

GOOD, BAD, FAINT = "green", "bold red", "dim"


def console() -> Console:
    """Return the console for results: with width and colours of a terminal, without them in a pipe, without markup."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # if it cannot encode ‖ or ✓
    width = None if sys.stdout is not None and sys.stdout.isatty() else _PIPED_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def printable(text: str) -> str:
    """Return the text with control characters escaped: names in a checkpoint must not control the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str | Text]], title: str | None = None) -> Table:
    """Return a table with words in the first column and numbers in the others."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(header):
        made.add_column(name, justify="right" if place else "left", header_style="bold", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def facts(found: Mapping[str, str | Text]) -> Table:
    """Return a table with a name and its value per line."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, fact in found.items():
        made.add_row(name, fact)
    return made


def print_json(value: Any) -> None:
    """Print as JSON, with null for NaN and infinity, which JSON does not have."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digits(value: float) -> str:
    """Return a number with three significant digits, including trailing zeros."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.2e}"


def check_picture(path: Path | None) -> None:
    """Raise, before the work, if the picture could not be written."""
    if path is None:
        return
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in kinds:
        raise CommandError(f"--plot {path}: expected a name that ends in .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise CommandError(f"--plot {path}: there is no folder {path.parent}")


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Return a number of bytes in a readable unit."""
    power = 0
    while abs(count) >= 1024 and power < len(_UNITS) - 1:
        count /= 1024
        power += 1
    return f"{count:,.0f} B" if power == 0 else f"{digits(count)} {_UNITS[power]}"
