"""The tables of a plan's rows that kernels read: addresses and sizes, and which program updates which part."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lucid.engine.numbers import BLOCK, COLUMNS, SHAPED_OPERANDS, Column, Dtype, MomentFormat, ParamFormat

if TYPE_CHECKING:
    from lucid.engine import _cpu

Table = NDArray[np.int64]


class DeviceRow(NamedTuple):
    """A row that is bound to a device, field by field as in ``csrc/rows.h``; types and formats are numbers."""

    row: int
    device_type: int
    device_index: int
    compute: int
    gradient: int
    form: int
    moments: int
    amsgrad: bool
    ema: bool
    dims: int
    numbered: bool
    whole_rows: bool
    wide: bool
    elements: int


class Kind(NamedTuple):
    """The constants that an update kernel is compiled for: how its rows are stored."""

    gradient: int
    compute: int
    form: int
    moments: int
    amsgrad: bool
    ema: bool
    dims: int
    numbered: bool
    whole_rows: bool
    wide: bool

    @classmethod
    def of(cls, row: DeviceRow) -> Kind:
        """Return the kind of a row. Fields that its format does not use get a fixed value, so fewer kernels compile."""
        blocks = row.moments == MomentFormat.EIGHT_BIT
        kind = cls(
            row.gradient,
            row.compute,
            row.form,
            row.moments,
            row.amsgrad,
            row.ema,
            row.dims,
            row.numbered,
            not blocks or row.whole_rows,
            row.wide,
        )
        return kind._replace(numbered=kind.draws and row.numbered)

    @property
    def draws(self) -> bool:
        """Whether something is stochastically rounded."""
        average = self.ema and self.compute != Dtype.FLOAT64
        return self.moments != MomentFormat.PLAIN or self.form == ParamFormat.BFLOAT16_DRAWN or average


class Geometry(NamedTuple):
    """How elements are divided: elements per tile, tiles per program, and warps per program."""

    tile: int
    tiles: int
    warps: int


class Gradients(NamedTuple):
    """The constants that the kernel of squares is compiled for."""

    gradient: int
    compute: int
    dims: int
    wide: bool

    @classmethod
    def of(cls, row: DeviceRow) -> Gradients:
        """Return the kind of a row's gradient."""
        return cls(row.gradient, row.compute, row.dims, row.wide)


class Programs(NamedTuple):
    """The programs of a launch: for each, the number of its row, and which part of the row."""

    rows: Table
    parts: Table

    @classmethod
    def of(cls, rows: Table, parts: Table) -> Programs:
        """Return one program for each part; ``parts`` has the number of parts of each row."""
        ends = np.cumsum(parts)
        first = np.repeat(ends - parts, parts)
        return cls(np.repeat(rows, parts), np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - first)

    @property
    def packed(self) -> Table:
        """The form that kernels read: the row in the lower 32 bits, the part in the upper."""
        return self.rows | self.parts << 32


class KindUpdate(NamedTuple):
    """The update of all rows of one kind."""

    kind: Kind
    geometry: Geometry
    programs: Programs


class KindSquares(NamedTuple):
    """The sum of the squares of all gradients of one kind, in rows of one kind of `lucid.engine.DeviceVerdict`."""

    kind: Gradients
    of_rows: int
    geometry: Geometry
    programs: Programs


class RowTable:
    """The rows of a plan that are bound to devices, on all devices, and the programs that process them."""

    def __init__(self, native: _cpu.Rows) -> None:
        self.structure: int = native.device_structure
        self.serial: bool = native.serial
        self.rows = [DeviceRow(*row) for row in native.device_rows()]
        dims = sum(row.dims for row in self.rows)
        self.table: Table = np.zeros((len(self.rows), COLUMNS), np.int64)
        self.layouts: Table = np.zeros(max(1, dims * (1 + SHAPED_OPERANDS)), np.int64)
        native.write_device_rows(self.table.ctypes.data, self.layouts.ctypes.data)
        # DLPack's (type, index) of each device that has rows.
        self.devices = list(dict.fromkeys((row.device_type, row.device_index) for row in self.rows))
        self._elements: Table = np.array([row.elements for row in self.rows], np.int64)

    def _of_device(self, type_and_index: tuple[int, int]) -> list[int]:
        return [n for n, row in enumerate(self.rows) if (row.device_type, row.device_index) == type_and_index]

    def updates(self, device: tuple[int, int], geometry_of: Callable[[Kind], Geometry]) -> list[KindUpdate]:
        """Return the updates of a device's rows, in order: one per kind, or one per row if rows share memory."""
        by_kind: dict[tuple[int, Kind], list[int]] = {}
        for number in self._of_device(device):
            by_kind.setdefault((number if self.serial else 0, Kind.of(self.rows[number])), []).append(number)
        found = []
        for (_, kind), numbers in by_kind.items():
            rows = np.array(numbers, np.int64)
            geometry = geometry_of(kind)
            part = geometry.tile * geometry.tiles
            if kind.whole_rows:
                parts = -(-self._elements[rows] // part)
            else:
                length = self.table[rows, Column.ROW]
                blocks = self._elements[rows] // np.maximum(length, 1) * -(-length // BLOCK)
                parts = -(-blocks // (part // BLOCK))
            programs = Programs.of(rows, parts)
            if len(programs.rows):
                found.append(KindUpdate(kind, geometry, programs))
        return found

    def squares(
        self, device: tuple[int, int], kinds: array[int] | None, geometry_of: Callable[[Gradients], Geometry]
    ) -> list[KindSquares]:
        """Return the sums of the squares of a device's gradients. ``kinds``: as in `lucid.engine.DeviceVerdict`."""
        by_kind: dict[tuple[Gradients, int], list[int]] = {}
        for number in self._of_device(device):
            row = self.rows[number]
            of_row = 0 if kinds is None else kinds[row.row]
            by_kind.setdefault((Gradients.of(row), of_row), []).append(number)
        found = []
        for (kind, of_rows), numbers in by_kind.items():
            rows = np.array(numbers, np.int64)
            geometry = geometry_of(kind)
            programs = Programs.of(rows, -(-self._elements[rows] // (geometry.tile * geometry.tiles)))
            if len(programs.rows):
                found.append(KindSquares(kind, of_rows, geometry, programs))
        return found
