"""The C++ extension: whether it loaded, which SIMD level it uses, and overrides for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    from . import _cpu
except ImportError as error:
    missing: str | None = f"its extension did not load ({error}); reinstall lucid-optim"  # why there is no CPU engine
    _cpu = None  # type: ignore[assignment]
else:
    missing = (
        None
        if _cpu.connect(torch.Tensor)
        else f"torch {torch.__version__} has no DLPack exchange API; torch 2.11 or newer has one"
    )


def new_rows(groups: list[list[Tensor]]) -> _cpu.Rows:
    """Return the rows of an optimizer; ``groups`` is the list of parameters of each group."""
    return _cpu.Rows(groups)


def connect_sharded(kind: type) -> None:
    """Tell the extension the class of sharded tensors (DTensor)."""
    if missing is None:
        _cpu.connect_sharded(kind)


def simd_levels() -> list[str]:
    """Return the SIMD levels that this build contains and this CPU can run, the widest last."""
    return _cpu.simd_levels()


def simd_level() -> str:
    """Return the SIMD level in use."""
    return _cpu.simd_level()


@contextmanager
def forced_simd_level(name: str) -> Iterator[None]:
    """Use SIMD level `name` inside; the bits are the same at every level."""
    before = simd_level()
    if not _cpu.set_simd_level(name):
        raise ValueError(f"SIMD level {name!r}: expected one of {simd_levels()}")
    try:
        yield
    finally:
        _cpu.set_simd_level(before)


@contextmanager
def forced_batch_elements(elements: int) -> Iterator[None]:
    """Use batches of `elements` inside (65,536 by default); the bits are the same for every size."""
    if elements < 1:
        raise ValueError(f"batch elements: expected at least 1, got {elements}")
    before = _cpu.batch_elements()
    _cpu.set_batch_elements(elements)
    try:
        yield
    finally:
        _cpu.set_batch_elements(before)
