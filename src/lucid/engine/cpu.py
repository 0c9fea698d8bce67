"""The CPU engine, in C++."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import torch

from .native import (
    forced_batch_elements,
    forced_simd_level,
    forced_team,
    hold,
    is_recorded,
    missing,
    new_rows,
    simd_level,
    simd_levels,
    step_threads,
    team,
    teams,
)
from .observed import Observed, Seen
from .protocol import StepOrder
from .row import Row

if TYPE_CHECKING:
    from . import reference
    from ._cpu import Rows

__all__ = [
    "CPU",
    "bind",
    "forced_batch_elements",
    "forced_simd_level",
    "forced_team",
    "hold",
    "is_recorded",
    "missing",
    "new_rows",
    "simd_level",
    "simd_levels",
    "step_threads",
    "team",
    "teams",
]

_NO_SCALARS = bytes(0)


class CPU:
    """The CPU engine, as `lucid.engine.protocol.Engine` has it.

    Its `write` also counts the step of the rows on a GPU, because one ``rows`` object holds all of them.
    """

    def __init__(self, rows: Rows | reference.Rows) -> None:
        self._rows = rows
        self._order: StepOrder | None = None
        self._begun = False  # `write` was called; after an interrupt, `rows.written` tells whether it wrote

    def bind(self, row: Row) -> None:
        bind(self._rows, row, on_device=False)

    def measure(self, scale: float, kinds: array[int] | None) -> list[int]:
        return self._rows.measure(torch.get_num_threads(), scale, kinds)

    def prepare(self, order: StepOrder) -> None:
        self._order, self._begun = order, False

    def write(self) -> list[tuple[int, Seen]]:
        order, rows = self._order, self._rows
        assert order is not None
        if not self._begun or not rows.written:
            self._begun = True
            rows.update(order.table or _NO_SCALARS, order.threads, order.observe, order.counts, order.state_box)
        return [(row, Observed(*seen)) for row, seen in rows.observed()] if order.observe else []

    def release(self) -> None:
        self._order = None
        self._rows.release()


def bind(rows: Rows | reference.Rows, row: Row, *, on_device: bool) -> None:
    """Add a checked row to this step; raise ValueError if the engine cannot use its memory."""
    fault = rows.bind(row.index, row.gradient, row.entry, row.roles, row.format, row.numbering, on_device)
    if fault is not None:
        raise ValueError(f"{row.name} cannot be updated: {fault}")
