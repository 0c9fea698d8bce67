"""What an optimizer costs beside time: memory during a step, and its import."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

_IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import lucid.optim
print(middle - start, time.perf_counter() - middle)
"""


class ImportSeconds(NamedTuple):
    """``import torch``, and ``import lucid.optim`` on top of it, in one fresh process."""

    torch: float
    lucid: float


def import_seconds(processes: int) -> list[ImportSeconds]:
    """Import in fresh processes; the first, which compiles and fills the system's file cache, is left out."""
    samples = []
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # with it an editable install compiles at each import
    for _ in tqdm(range(processes + 1), "import", leave=False, disable=None):
        run = subprocess.run(
            [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True, env=environment
        )
        samples.append(ImportSeconds(*map(float, run.stdout.split())))
    return samples[1:]


def _kibibytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def resident_bytes() -> int | None:
    """Return how much of this process lies in memory, None where the system cannot tell (Linux with glibc can)."""
    libc = ctypes.CDLL(None)
    if not Path("/proc/self/status").exists() or not hasattr(libc, "malloc_trim"):
        return None
    libc.malloc_trim(0)
    return _kibibytes("VmRSS:") * 1024


def temporary_bytes(step: Callable[[], object]) -> int | None:
    """Return by how much a step's peak of resident memory exceeds what was resident before.

    The kernel counts in pages and, with threads, in batches of them: some dozen KiB are noise.
    None where the system cannot tell (Linux with glibc can).
    """
    reset = Path("/proc/self/clear_refs")
    libc = ctypes.CDLL(None)
    if not reset.exists() or not hasattr(libc, "malloc_trim"):
        return None

    step()
    try:
        libc.malloc_trim(0)  # what earlier steps freed and malloc kept is not resident then
        reset.write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _kibibytes("VmRSS:")
    step()
    return max(0, _kibibytes("VmHWM:") - before) * 1024
