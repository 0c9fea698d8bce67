"""Warnings that point to the line of the user's own code that caused them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_PACKAGES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line of the call stack that is outside of this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
