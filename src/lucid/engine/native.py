"""The C++ extension: whether it loaded, which SIMD level it uses, and overrides for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import threads

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


def _is_forked() -> bool:
    """Whether this process was forked, so that it lacks threads of its parent that torch may take for its own.

    A fork has its parent's auxiliary vector, whose addresses are random. Only Linux's libgomp has this problem.
    """
    try:
        own, parents = (Path(f"/proc/{process}/auxv").read_bytes() for process in ("self", os.getppid()))
    except OSError:
        return False
    return own == parents


_OWN_THREADS = torch.get_num_threads()  # torch's choice, if nobody has set another number before

if missing is None:
    _cpu.find_team(torch._C.__file__, torch.get_num_threads, _is_forked())
    _cpu.find_callbacks(torch._C.__file__)
    is_recorded = _cpu.recorded  # whether a profiler or the like records what this thread runs
    hold = _cpu.hold
else:

    def is_recorded() -> bool:
        return True

    def hold(dicts: list[Any], kind: type, keys: tuple[str, ...], values: list[tuple[Any, ...]]) -> bool:
        return False


def new_rows(groups: list[list[Tensor]]) -> _cpu.Rows:
    """Return the rows of an optimizer; ``groups`` is the list of parameters of each group."""
    set_thread_budget()
    return _cpu.Rows(groups)


def set_thread_budget() -> None:
    """Limit the threads of steps to this process's share of the CPUs, unless you have set torch's number of threads."""
    budget = threads.budget()
    _cpu.set_thread_budget(_OWN_THREADS, _OWN_THREADS if budget is None else budget)


def step_threads() -> int:
    """Return how many threads a large step of this thread uses at most."""
    number, budget = torch.get_num_threads(), threads.budget()
    return number if budget is None or number != _OWN_THREADS else min(number, budget)


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


def team() -> tuple[str, str]:
    """Return which threads run a large step of this thread, and why: torch's OpenMP team or our own pool."""
    return _cpu.team()


def teams() -> list[str]:
    """Return those that this process has, the preferred one last."""
    return _cpu.teams()


@contextmanager
def forced_team(name: str) -> Iterator[None]:
    """Prefer ``"torch"`` or ``"pool"`` inside; the bits are the same."""
    before = _cpu.preferred_team()
    if not _cpu.set_preferred_team(name):
        raise ValueError(f"team {name!r}: expected 'torch' or 'pool'")
    try:
        yield
    finally:
        _cpu.set_preferred_team(before)


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
