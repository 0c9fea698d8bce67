"""The CUDA engine: Triton kernels, each launched once for all rows of one kind.

Five modules are in Triton: ``adamw.py`` is the rule, ``formats.py`` loads and stores values, ``kernels.py`` updates,
``squares.py`` adds squares exactly, and ``decide.py`` decides a step. ``row_table.py`` makes the tables of rows that
kernels read, ``launch.py`` launches kernels, ``device_tables.py`` holds the tables on one device, and ``device.py``
runs a step. These modules import Triton; they are imported when the first row on a GPU is bound.
"""

from __future__ import annotations

import importlib.util

import torch

from lucid.engine import cpu

missing: str | None
if cpu.missing is not None:
    missing = cpu.missing
elif importlib.util.find_spec("triton") is None:
    missing = "Triton is not installed; torch's CUDA builds for Linux include it, elsewhere pip install triton"
else:
    missing = None


def is_capturing() -> bool:
    """Whether kernels launched now are captured in a CUDA graph."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()
