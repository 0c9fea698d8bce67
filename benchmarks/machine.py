"""What the committed figures were measured on: the machine, and which commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import lucid
from lucid.bench import machine


def description() -> dict[str, str]:
    """Return machine, versions, commit and date, each as a line for people."""
    return machine.description(f"{lucid.__version__} ({_commit()})")


def _commit() -> str:
    """The commit of this checkout, `+` where files differ from it."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or "no git"
