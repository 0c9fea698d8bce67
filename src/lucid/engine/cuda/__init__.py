"""The CUDA engine: kernels in Triton, launched once for all rows of one kind.

``adamw.py`` is the rule, ``formats.py`` how values are stored, ``kernels.py`` what is launched, all three in Triton;
``table.py`` is what kernels are told of rows, ``launch.py`` how they are launched, ``resident.py`` what lies on a
device, ``device.py`` what happens in a step. Triton is imported with them, when the first row on a GPU is met.
"""

from __future__ import annotations

import importlib.util

import torch

from lucid.engine import cpu

missing: str | None
if cpu.missing is not None:
    missing = cpu.missing
elif importlib.util.find_spec("triton") is None:
    missing = "Triton is not installed; torch's CUDA builds bring it along on Linux, elsewhere pip install triton"
else:
    missing = None


def is_capturing() -> bool:
    """Whether what is launched now is captured in a CUDA graph, to be run later."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()
