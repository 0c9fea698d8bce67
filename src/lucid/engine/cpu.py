"""The CPU engine's face: which SIMD level it runs, and the overrides that its tests need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

try:
    from . import _cpu
except ImportError as error:
    missing: str | None = f"its extension did not load ({error}); reinstall lucid-optim"
else:
    Plan = _cpu.Plan
    missing = (
        None
        if _cpu.connect(torch.Tensor)
        else f"torch {torch.__version__} has no DLPack exchange API; torch 2.11 or newer has"
    )


def connect_sharded(kind: type) -> None:
    """Make known the class of tensors that are spread over processes."""
    if missing is None:
        _cpu.connect_sharded(kind)


def simd_levels() -> list[str]:
    """Return the SIMD levels that this build has and this CPU can run, the widest last."""
    return _cpu.simd_levels()


def simd_level() -> str:
    """Return the SIMD level in use."""
    return _cpu.simd_level()


@contextmanager
def forced_simd_level(name: str) -> Iterator[None]:
    """Run at SIMD level `name`; the bits are the same at each."""
    before = simd_level()
    if not _cpu.set_simd_level(name):
        raise ValueError(f"SIMD level {name!r}: expected one of {simd_levels()}")
    try:
        yield
    finally:
        _cpu.set_simd_level(before)


@contextmanager
def forced_batch_elements(elements: int) -> Iterator[None]:
    """Cut the work into batches of `elements` (65,536 by default); the bits are the same for each."""
    if elements < 1:
        raise ValueError(f"batch elements: expected at least 1, got {elements}")
    before = _cpu.batch_elements()
    _cpu.set_batch_elements(elements)
    try:
        yield
    finally:
        _cpu.set_batch_elements(before)
